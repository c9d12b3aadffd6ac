"""A run with compiled layers: it says what that took, and learns what it would have learned."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.processes import run_processes
from tests.train.small_run import prepare_small_corpus, small_run
from tests.train.test_profiling import train


@pytest.mark.slow
def test_it_learns_the_same_and_says_what_compilation_took(tmp_path: Path) -> None:
    shards = prepare_small_corpus(tmp_path)
    losses = {}
    for compiles in (False, True):
        changes: dict[str, Any] = {"train": {"stop_step": 3, "compile_layers": compiles}, "logging": {"every": 1}}
        config = small_run(tmp_path / "runs", shards, f"run-{compiles}", parallel={"data": 1}, **changes)
        printed = run_processes(1, train, config)[0]
        assert ("compilation" in printed) == compiles
        losses[compiles] = [float(loss) for loss in re.findall(r"step \d+/\d+ +loss (\d+\.\d+)", printed)]
    assert len(losses[True]) >= 3
    assert losses[True] == pytest.approx(losses[False], abs=2e-4)
