"""The benchmark of training steps with small models: what it counts, compares and writes."""

import json
from pathlib import Path

import pytest
import yaml

from benchmarks.step_components import HEAD
from tests.tools.outcomes import Script
from train.config import REPOSITORY

BENCHMARK = REPOSITORY / "benchmarks" / "train_step.py"


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
def test_variants_are_measured_side_by_side(tmp_path: Path, benchmark: Script) -> None:
    outcome = benchmark(
        str(write_config(tmp_path)),
        *(
            "--variants",
            "train.micro_batch_size=2",
            "parallel.tensor=2 parallel.block_parallel=true parallel.zero_stage=0",
        ),
        *("--steps", "2", "--threads", "2", "--output", str(tmp_path / "out")),
    )
    assert outcome.status == 0, outcome.errors
    record = json.loads((tmp_path / "out" / "train_step.json").read_text())
    assert record["limits"]["flops_per_second"] > 0
    first, second = record["results"]
    assert first["name"] == "small train.micro_batch_size=2"
    assert (first["tokens"], second["tokens"]) == (64, 32)
    assert second["layout"]["tensor"] == 2
    for one in (first, second):
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
        assert one["memory_bytes"] >= 0
        assert one["planned_bytes"] > 0
    assert (tmp_path / "out" / "train_step.md").read_text() in outcome.output


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
