"""train.profile=true: what is written, by whom, and what happens to short runs."""

import contextlib
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest

from parallel.topology import initialize_topology
from tests.processes import run_processes
from tests.train.small_run import prepare_small_corpus, small_run
from train.config import RunConfig
from train.profiling import RECORDED, SETTLING, WARM_UP
from train.requests import Requests
from train.stop_signals import StopSignals
from train.trainer import Trainer

NEEDED = SETTLING + WARM_UP + RECORDED


def train(config: RunConfig) -> str:
    """Returns what this rank prints."""
    place = initialize_topology(config.parallel)
    requests = Requests(config.directory, StopSignals(), None, 0.0, watches_files=place.rank == 0)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        Trainer(config, place, requests).run()
    return printed.getvalue()


def names_of(trace: Path) -> set[str]:
    with gzip.open(trace, "rt") as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return {str(event.get("name")) for event in events}


@pytest.mark.slow
def test_a_trace_has_the_named_regions(tmp_path: Path) -> None:
    shards = prepare_small_corpus(tmp_path)
    changes: dict[str, Any] = {"train": {"steps": NEEDED + 1, "profile": True}, "optimizer": {"warmup_steps": 1}}
    layouts = {"pipeline": {"pipeline": 2, "data": 1}, "data": {"data": 2}}
    for name, layout in layouts.items():
        config = small_run(tmp_path / "runs", shards, name, parallel=layout, **changes)
        printed = run_processes(2, train, config)[0]
        folder = config.directory / "tensorboard" / "profile"
        traces = sorted(folder.glob("*_rank*.pt.trace.json.gz"))
        # One replica records, all of its ranks.
        assert len(traces) == len(list(folder.glob("memory_rank*.txt"))) == layout.get("pipeline", 1)
        regions = [names_of(trace) for trace in traces]
        steps = {f"ProfilerStep#{number}" for number in range(SETTLING + WARM_UP, NEEDED)}
        for found in regions:
            assert {"data", "forward and backward", "optimizer", "logging", *steps} <= found
        assert "embedder" in regions[0]
        assert "token_decoder.output" in regions[-1]
        assert f"a trace of {RECORDED} steps is in {folder}" in printed
        assert ("% expected)" in printed) == (name == "pipeline")
        memory = next(folder.glob("memory_rank0.*.txt")).read_text()
        assert "Self CPU Mem" in memory


@pytest.mark.slow
def test_too_short_a_run_says_so(tmp_path: Path) -> None:
    shards = prepare_small_corpus(tmp_path)
    changes: dict[str, Any] = {"train": {"steps": NEEDED - 1, "profile": True}, "optimizer": {"warmup_steps": 1}}
    config = small_run(tmp_path / "runs", shards, parallel={"data": 1}, **changes)
    printed = run_processes(1, train, config)[0]
    assert f"needs {NEEDED} steps in a row, and there were {NEEDED - 1}" in printed
    assert not list((config.directory / "tensorboard" / "profile").iterdir())
