"""Every parallel layout against the unsharded model, in real process groups (train/selftest.py)."""

import pytest

from tests.processes import run_processes
from train.selftest import Comparison, parity_matrix, run_matrix


def run_cases(world_size: int) -> list[Comparison]:
    return run_matrix(parity_matrix(world_size), report=lambda comparison: print(comparison, flush=True))


@pytest.mark.parametrize("world_size", [1, *(pytest.param(size, marks=pytest.mark.slow) for size in (2, 4, 8))])
def test_parity(world_size: int) -> None:
    comparisons = run_processes(world_size, run_cases, world_size)[0]
    assert len(comparisons) == len(parity_matrix(world_size)) > 0
    failed = [comparison for comparison in comparisons if not comparison.passed]
    assert not failed, "\n".join(map(str, failed))
