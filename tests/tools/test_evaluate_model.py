"""tools/evaluate_model.py as a user runs it, on a small random model."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed

from evaluation.suite import OWN_EVALUATIONS
from parallel.component_config import DecoderConfig
from parallel.config import ModelConfig, ParallelConfig
from parallel.stage import build_stage
from parallel.topology import start_single_process
from tests.evaluation.harness.local_files import train_tokenizer, write_local_files
from tests.inference.saved_model import save_model
from tests.tools.outcomes import Outcome, Script
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


@pytest.fixture(scope="module")
def task_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_local_files(tmp_path_factory.mktemp("task_data"))


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Script]:
    before = signal.getsignal(signal.SIGTERM)
    yield Script(SCRIPT, monkeypatch, capsys)
    signal.signal(signal.SIGTERM, before)


def error_of(outcome: Outcome) -> str:
    """The one error of a run that loaded no model."""
    assert outcome.status == 2
    assert outcome.output == ""
    [error] = [line for line in outcome.errors if not line.startswith("warning: step 12 is skipped")]
    return error


@pytest.mark.slow
def test_results_are_printed_also_if_the_file_cannot_be_written(script: Script, run_folder: Path) -> None:
    options = ["--batch-size", "2", "--json"]
    command = [sys.executable, SCRIPT, "--checkpoint", ".", *options, "missing/results.json"]
    result = subprocess.run(command, cwd=run_folder, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stdout.startswith("step 9 of named\nvalidation loss")
    warning, error = result.stderr.splitlines()
    assert warning.startswith("warning: step 12 is skipped: ")
    assert error == "error: --json missing/results.json cannot be written: No such file or directory; name another file"
    assert script("--checkpoint", run_folder, *options, run_folder / "results.json").status == 0
    assert json.loads((run_folder / "results.json").read_text())["step"] == 9


def test_evaluations_of_all_kinds(script: Script, run_folder: Path, task_data: Path) -> None:
    options = ["--checkpoint", run_folder, "--task-data", task_data, "--batch-size", 2]
    outcome = script(*options, "--tasks", "piqa", "validation", "piqa", "--limit", 5)
    assert outcome.status == 0, outcome.errors
    assert [line.split()[0] for line in outcome.output.splitlines()][:5] == [
        "step", "piqa", "acc", "acc_norm", "validation",
    ]  # fmt: skip
    assert script(*options, "--tasks", "lambada_openai", "--padding", "none").status == 0
    folder = run_folder / "evaluation" / "step_9"
    results = json.loads((folder / "results.json").read_text())["results"]
    assert results.keys() == {"piqa", "validation", "lambada_openai"}
    assert (results["piqa"]["documents"], results["piqa"]["padding"]) == (5, "left")
    assert (results["lambada_openai"]["documents"], results["lambada_openai"]["padding"]) == (8, "none")
    assert results["lambada_openai"]["versions"] == {"lm_eval": "0.4.13", "lambada_openai": "1.0"}
    assert list((run_folder / "tensorboard" / "evaluation").glob("events*"))
    assert not list((run_folder / "tensorboard").glob("events*")), "the run's own"


def test_what_is_finished_is_kept(script: Script, run_folder: Path, task_data: Path, tmp_path: Path) -> None:
    """Validation needs more sequences than there are, and this shows only at work."""
    options = ["--checkpoint", run_folder, "--task-data", task_data, "--batch-size", 1000, "--output", tmp_path / "out"]
    outcome = script(*options, "--tasks", "winogrande", "validation", "piqa")
    assert outcome.status == 2
    assert "batch size 1000 must be at least 2 and at most" in outcome.errors[-1]
    assert json.loads((tmp_path / "out" / "results.json").read_text())["results"].keys() == {"winogrande"}
    assert list((tmp_path / "out" / "tensorboard").glob("events*"))


def test_too_large_a_batch_is_one_sentence(
    script: Script, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OWN_EVALUATIONS, "positions", lambda request: lambda model: torch.empty(2**60))  # type: ignore[arg-type, return-value]
    outcome = script("--checkpoint", run_folder, "--output", tmp_path, "--tasks", "positions", "--batch-tokens", 2**50)
    assert outcome.status == 2
    assert outcome.errors[-1].startswith("error: the batches of an evaluation do not fit into memory (")
    assert outcome.errors[-1].endswith(
        f"lower --batch-tokens, which is {2**50}, or --batch-size for validation, which is 16"
    )


def test_mistakes_are_found_before_the_model_is_loaded(
    script: Script, run_folder: Path, task_data: Path, tmp_path: Path
) -> None:
    large = train_tokenizer(tmp_path / "tokenizer.json")
    for arguments, message in [
        (["--tasks", "piqqa"], "--tasks piqqa is unknown; near it are piqa"),
        (["--tasks", "validation", "sciq", "--json", "x"], "--json holds the results of one evaluation"),
        (["--tasks", "piqa", "--task-data", tmp_path / "none"], "none is not a folder"),
        (["--tasks", "piqa", "--task-data", tmp_path], "has no piqa_valid.jsonl, which piqa reads; put it there"),
        (["--tasks", "piqa", "--tokenizer", large], "has 500 tokens, the model knows 384"),
        (["--tasks", "piqa", "--tokenizer", tmp_path / "no.json"], "no.json does not exist"),
        (["--tasks", "piqa", "--output", large / "out"], "name another folder with --output"),
        (["--checkpoint", tmp_path], "holds no checkpoint"),
    ]:
        outcome = script("--checkpoint", run_folder, "--task-data", task_data, *arguments)
        assert message in error_of(outcome)
    outcome = script("--checkpoint", run_folder, "--limit", "0")
    assert outcome.status == 2
    assert outcome.errors[-1].endswith("argument --limit: 0 is not a number of at least 1")


@pytest.mark.slow
def test_an_interruption_ends_it_in_one_line(run_folder: Path, task_data: Path, tmp_path: Path) -> None:
    options = ["--checkpoint", run_folder, "--task-data", task_data, "--output", tmp_path / "out", "--batch-tokens", 1]
    tasks = ["winogrande", "wikitext", "lambada_openai", "hellaswag", "piqa", "arc_easy", "sciq", "validation"]
    command = [sys.executable, SCRIPT, *map(str, options), "--tasks", *tasks]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / "results.json").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert "Traceback" not in errors
    assert (process.returncode, errors.splitlines()[-1]) == (130, "interrupted")
    assert "winogrande" in json.loads((tmp_path / "out" / "results.json").read_text())["results"]
