"""A run with compiled layers: it says what that took, and learns what it would have learned."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.compilation import compile_layers
from parallel.errors import ConfigurationError
from tests.processes import run_processes
from tests.train.small_run import prepare_small_corpus, small_run
from tests.train.test_profiling import train
from train.config import RunConfig


def startup_seconds(printed: str) -> dict[str, float]:
    """Phases of the start-up line."""
    found = re.search(r"after the start \((.*)\)", printed)
    assert found is not None
    return {name.strip(): float(value) for name, value in re.findall(r"([a-z ]+) (-?\d+\.\d+)", found[1])}


def train_twice(config: RunConfig, second: RunConfig) -> list[str]:
    """Two runs in one process, as the stages of an uptraining under torchrun are."""
    return [train(config), train(second)]


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


@pytest.mark.slow
def test_two_runs_in_one_process_share_no_time(tmp_path: Path) -> None:
    shards = prepare_small_corpus(tmp_path)
    changes: dict[str, Any] = {"train": {"stop_step": 1, "compile_layers": True}, "validation": {"every": 0}}
    runs = [small_run(tmp_path / "runs", shards, name, parallel={"data": 1}, **changes) for name in ("one", "two")]
    for printed in run_processes(1, train_twice, *runs)[0]:
        seconds = startup_seconds(printed)
        assert min(seconds["compilation"], seconds["first step"]) >= 0
        assert seconds["compilation"] > 0


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigurationError, match=r"needs a C\+\+ compiler.* no no-such-compiler.*install"):
        compile_layers(torch.nn.Linear(1, 1))
