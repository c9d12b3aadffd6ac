"""The benchmark of training steps with small models: what it counts, compares and writes."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import yaml

from benchmarks import train_step
from benchmarks.step_components import HEAD
from parallel.device_limits import DeviceLimits
from parallel.planning.calibration import read_benchmark
from parallel.planning.search import largest_memory
from tests.tools.outcomes import Script
from train.config import REPOSITORY

BENCHMARK = REPOSITORY / "benchmarks" / "train_step.py"
# Runs a command after it has itself held a GiB, whose peak that command's processes must not take for theirs.
LARGE_PARENT = """
import subprocess, sys
ballast = bytearray(b"x") * 2**30
del ballast
sys.exit(subprocess.run(sys.argv[1:]).returncode)
"""


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Script:
    monkeypatch.setenv("PYTHONSAFEPATH", "1")  # its processes must find their modules all the same
    return Script(BENCHMARK, monkeypatch, capsys)


def write_config(folder: Path, **model: object) -> Path:
    stack = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4}
    shape = {"vocab_size": 96, "sequence_length": 32, "block_decoder": stack, "token_decoder": stack}
    values = {
        "run": {"name": "small"},
        "model": shape | model,
        "data": {"path": "shards"},
        "train": {"steps": 2, "global_batch_size": 8, "micro_batch_size": 8},
        "optimizer": {"learning_rate": 1e-3},
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.slow
def test_variants_are_measured_side_by_side(tmp_path: Path) -> None:
    stack = {"num_layers": 1, "hidden_size": 256, "num_attention_heads": 4}
    path = write_config(tmp_path, vocab_size=16384, block_decoder=stack, token_decoder=stack)
    variants = ["train.micro_batch_size=2", "parallel.tensor=2 parallel.block_parallel=true parallel.zero_stage=0"]
    options = ["--variants", *variants, "--steps", "2", "--threads", "2", "--output", str(tmp_path / "out")]
    outcome = subprocess.run(
        [sys.executable, "-c", LARGE_PARENT, sys.executable, str(BENCHMARK), str(path), *options],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"PYTHONSAFEPATH": "1"},
    )
    assert outcome.returncode == 0, outcome.stderr
    record = json.loads((tmp_path / "out" / "train_step.json").read_text())
    assert record["limits"]["flops_per_second"] > 0
    first, second = record["results"]
    assert first["name"] == "small train.micro_batch_size=2"
    assert (first["tokens"], second["tokens"]) == (64, 32)
    assert (second["layout"]["tensor"], second["precision"]) == (2, "fp32")
    subjects = train_step.candidates(Namespace(configs=[path], variants=variants), {"": REPOSITORY})
    for one, subject in zip((first, second), subjects, strict=True):
        assert len(one["step_seconds"]) == 2
        beside = {name: one["components"].pop(name) for name in ("data, before the step", "logging, after it")}
        assert min(beside.values()) > 0
        sending = [one["components"].pop(name) for name in list(one["components"]) if name.startswith("communication")]
        assert [0 < seconds < one["components"]["step"] * 10 for seconds in sending] == [True] * (one is second)
        parts = {name: seconds for name, seconds in one["components"].items() if name != "step"}
        assert sum(parts.values()) == pytest.approx(one["components"]["step"])
        assert {
            "embedder: forward",
            f"{HEAD}: forward",
            "token decoder, attention: backward",
            "optimizer",
        } <= parts.keys()
        plan = largest_memory(subject.config.workload)
        # Beyond the plan: libraries that the first step loads, and what the C library keeps.
        assert plan.parameters + plan.optimizer < one["memory_bytes"] < plan.total + 2**28
        assert one["planned_bytes"] == plan.total
    assert (tmp_path / "out" / "train_step.md").read_text() in outcome.stdout
    assert len(list((tmp_path / "out").iterdir())) == 2


class Interrupted:
    """Processes of a candidate that Ctrl-C meets while they measure components."""

    started: ClassVar = [{"imports_bytes": 100.0}]

    def __init__(self, *_: object) -> None: ...

    def __enter__(self) -> "Interrupted":
        return self

    def __exit__(self, *_: object) -> None: ...

    def ask(self, command: str) -> list[dict[str, float]]:
        if command == "components":
            raise KeyboardInterrupt
        return [
            {
                "step_seconds": 2.0,
                "optimizer_seconds": 0.5,
                "yardstick_flops_per_second": 1e10,
                "peak_bytes": 300.0,
            }
        ]


def test_an_interrupted_benchmark_keeps_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_step, "Processes", Interrupted)
    monkeypatch.setattr(train_step, "measure_device_limits", lambda *_: DeviceLimits("CPU", "float32", 1e11, 1e10))
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["train_step", str(write_config(tmp_path)), "--steps", "3", "--output", str(out)])
    with pytest.raises(KeyboardInterrupt):
        train_step.main()
    (entry,) = read_benchmark(out / "train_step.json").entries
    assert (entry.step_seconds, entry.tokens) == (2.0, 32)
    (result,) = json.loads((out / "train_step.json").read_text())["results"]
    assert result["step_seconds"] == [2.0] * 3
    assert result["components"] == {}


def test_earlier_results_are_not_overwritten(tmp_path: Path, benchmark: Script) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "train_step.json").write_text("earlier")
    outcome = benchmark(write_config(tmp_path), "--output", out)
    assert outcome.status == 2
    assert outcome.errors[-1].startswith(f"error: --output {out} has a train_step.json already")
    assert (out / "train_step.json").read_text() == "earlier"


@pytest.mark.parametrize("name", ["train_step.json", "train_step.md"])
def test_results_that_cannot_be_written_are_not_measured(tmp_path: Path, benchmark: Script, name: str) -> None:
    (tmp_path / "out" / name).mkdir(parents=True)
    outcome = benchmark(write_config(tmp_path), "--output", tmp_path / "out")
    assert outcome.status == 2
    assert outcome.errors[-1].startswith("error: --output: ")
    assert f"{name} cannot be written" in outcome.errors[-1]
    assert outcome.output == ""


def test_more_processes_than_gpus(tmp_path: Path, benchmark: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    outcome = benchmark(write_config(tmp_path), "--variants", "", "parallel.tensor=2", "--output", tmp_path / "out")
    assert outcome.status == 2
    assert "small parallel.tensor=2 has 2 processes, but there is 1 GPU;" in outcome.errors[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variants", "parallel.tensor=3"], "num_attention_heads=4"),
        (["--against", "HEAD", "no-such-commit"], "--against no-such-commit"),
        (["--steps", "0"], "--steps"),
        (["--variants", 'run.name="a'], "No closing quotation"),
        (
            ["--variants", "parallel.activation_checkpointing=budget parallel.activation_memory_gib=1e-5"],
            "activation_memory_gib",
        ),
    ],
)
def test_mistakes_are_found_before_anything_is_built(
    tmp_path: Path, benchmark: Script, arguments: list[str], message: str
) -> None:
    outcome = benchmark(str(write_config(tmp_path)), *arguments, "--output", str(tmp_path / "out"))
    assert outcome.status == 2
    assert message in outcome.errors[-1]
    assert not (tmp_path / "out").exists()
