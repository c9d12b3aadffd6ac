"""Every parallel layout against the unsharded model, in real process groups (train/selftest.py)."""

import pytest

from tests.processes import run_processes
from train.selftest import WORLD_SIZES, Case, Comparison, parity_matrix, run_matrix
from train.selftest_models import MODELS, UNPIPELINED, VARIANTS

GROUPS = {"paper": ("block", "vanilla"), "variants": tuple(VARIANTS)}
slow = pytest.mark.slow


def cases(world_size: int, group: str) -> list[Case]:
    return [case for case in parity_matrix(world_size) if case.model in GROUPS[group]]


def run_cases(world_size: int, group: str) -> list[Comparison]:
    return run_matrix(cases(world_size, group), report=lambda comparison: print(comparison, flush=True))


@pytest.mark.parametrize(
    ("world_size", "group"),
    [
        (1, "paper"),
        *(pytest.param(size, "paper", marks=slow) for size in (2, 4, 8)),
        *(pytest.param(size, "variants", marks=slow) for size in (1, 2, 4)),
    ],
)
def test_parity(world_size: int, group: str) -> None:
    comparisons = run_processes(world_size, run_cases, world_size, group)[0]
    assert len(comparisons) == len(cases(world_size, group)) > 0
    failed = [comparison for comparison in comparisons if not comparison.passed]
    assert not failed, "\n".join(map(str, failed))


def test_every_variant_has_a_tensor_and_a_pipeline_parallel_case() -> None:
    matrix = [case for size in WORLD_SIZES for case in parity_matrix(size)]
    assert {case.model for case in matrix if case.parallel.tensor > 1} == MODELS.keys()
    assert {case.model for case in matrix if case.parallel.pipeline > 1} == MODELS.keys() - set(UNPIPELINED)
