"""`make pretrain`, the first thing a new user types: learns English, leaves a usable run, and never overwrites it."""

import json
import subprocess
from pathlib import Path

import pytest

from checkpoints.store import CheckpointStore

ROOT = Path(__file__).resolve().parents[1]
RUN = ROOT / "runs" / "quickstart"

pytestmark = pytest.mark.quickstart


def make(target: str) -> str:
    result = subprocess.run(["make", target], cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_make_pretrain_learns_and_a_second_call_reports_completion() -> None:
    make("pretrain")
    result = json.loads((RUN / "evaluation.json").read_text())
    assert result["loss"] <= result["unigram_entropy"] - 0.4
    assert result["shuffled_context_loss"] >= result["loss"] + 0.1, "the block decoder is used"
    assert CheckpointStore(RUN / "checkpoints").newest() is not None
    assert list((RUN / "tensorboard").glob("events*"))
    weights = sorted((RUN / "checkpoints").rglob("*.safetensors"))
    before = [path.stat().st_mtime_ns for path in weights]
    again = make("pretrain")
    assert "complete at step 600; nothing to do" in again
    assert "It was a" in again, "a sample of text"
    assert [path.stat().st_mtime_ns for path in weights] == before
