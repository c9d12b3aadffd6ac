"""tools/evaluate_model.py as a user runs it, on a small random model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed

from parallel.component_config import DecoderConfig
from parallel.config import ModelConfig, ParallelConfig
from parallel.stage import build_stage
from parallel.topology import start_single_process
from tests.inference.saved_model import save_model
from tests.train.small_run import VOCABULARY, prepare_small_corpus

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "evaluate_model.py"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose newest checkpoint lacks a file."""
    shards = prepare_small_corpus(tmp_path_factory.mktemp("corpus"))
    stack = DecoderConfig(num_layers=1, hidden_size=32, num_attention_heads=4)
    config = ModelConfig(vocab_size=VOCABULARY, sequence_length=64, block_decoder=stack, token_decoder=stack)
    folder = tmp_path_factory.mktemp("runs") / "named"
    start_single_process()
    try:
        stage = build_stage(config, ParallelConfig())
        for step in (9, 12):
            newest = save_model(folder / "checkpoints", step, stage, {"path": str(shards)})
    finally:
        torch.distributed.destroy_process_group()
    os.remove(newest / "rank_00000.safetensors")
    return folder


def test_results_are_printed_also_if_the_file_cannot_be_written(run_folder: Path) -> None:
    options = ["--checkpoint", ".", "--batch-size", "2", "--json"]
    command = [sys.executable, str(SCRIPT), *options]
    result = subprocess.run([*command, "missing/results.json"], cwd=run_folder, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stdout.startswith("step 9 of named\nvalidation loss")
    warning, error = result.stderr.splitlines()
    assert warning.startswith("warning: step 12 is skipped: ")
    assert error == "error: --json missing/results.json cannot be written: No such file or directory; name another file"
    result = subprocess.run([*command, "results.json"], cwd=run_folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads((run_folder / "results.json").read_text())["step"] == 9
