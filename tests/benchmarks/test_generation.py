"""Both protocols, with the paper's smallest models and a few tokens: what needs a GPU for hours is at least sound."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import generation
from benchmarks.generation import ON_CPU, ON_GPU, Reference, run_protocol
from evaluation.throughput.study import Setting
from tests.tools.outcomes import Script

SETTING = Setting(5, 3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:prompt and new tokens")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_short_protocol(tmp_path: Path, dtype: torch.dtype) -> None:
    largest = 3 if dtype is torch.bfloat16 else None
    references = {("block_main_b4_5", SETTING, 1): Reference(10.0, 2.0), ("vanilla_31", SETTING, None): Reference(5.0)}
    losses = {"block_main_b4_5": 3.578, "vanilla_31": 3.002}
    protocol = replace(
        ON_CPU, losses=losses, settings=(SETTING,), batch_sizes=(1,), largest=largest, references=references
    )
    report = run_protocol(protocol, torch.device("cpu"), dtype, 1, tmp_path)
    rows = [line for line in report if line.startswith("| block_main_b4_5 | 5/3 | 1 |")]
    assert len(rows) == 2
    assert "| 10 |" in rows[1]
    sizes = 3 if largest else 1
    assert len((tmp_path / "throughput.csv").read_text().splitlines()) == 1 + 2 * sizes
    assert any(line.startswith("block_main_b4_5 / vanilla_31, 5/3, batch 1: ") for line in report)
    assert (tmp_path / "throughput_by_loss.png").exists()


def test_every_reference_is_of_a_point_that_is_measured() -> None:
    for protocol in (ON_CPU, ON_GPU):
        for name, setting, size in protocol.references:
            assert name in protocol.losses
            assert setting in protocol.settings
            assert size in protocol.batch_sizes or (size is None and protocol.largest)


def test_mistakes_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    script = Script(Path(generation.__file__), monkeypatch, capsys)
    (tmp_path / "file").touch()
    outcome = script("--output", tmp_path / "file")
    assert (outcome.status, len(outcome.errors)) == (2, 1)
    assert "cannot be made: File exists; name another folder" in outcome.errors[0]
    outcome = script("--output", tmp_path, "--repeats", "0")
    assert (outcome.status, "0 is not a number of at least 1" in outcome.errors[-1]) == (2, True)
