"""tools/generate.py as a user runs it, on a small random model."""

import io
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed

from parallel.component_config import DecoderConfig
from parallel.config import ModelConfig, ParallelConfig
from parallel.stage import build_stage
from parallel.topology import start_single_process
from tests.inference.saved_model import save_model
from tests.tools.outcomes import Outcome, Script
from tests.train.small_run import VOCABULARY, prepare_small_corpus

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "generate.py"
PROMPT = "It was a"


class Generate:
    """The script with a checkpoint, a prompt and a number of tokens."""

    def __init__(self, script: Script) -> None:
        self._script = script

    def __call__(self, checkpoint: Path, *options: str, prompt: str | None = PROMPT, tokens: int = 12) -> Outcome:
        given = [] if prompt is None else ["--prompt", prompt]
        with warnings.catch_warnings(action="default", category=UserWarning):
            return self._script("--checkpoint", checkpoint, "--max-new-tokens", tokens, *given, *options)


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Generate]:
    before = signal.getsignal(signal.SIGPIPE)
    yield Generate(Script(SCRIPT, monkeypatch, capsys))
    signal.signal(signal.SIGPIPE, before)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_small_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """A run with one checkpoint; its tables are larger than the tokenizer."""
    stack = DecoderConfig(num_layers=1, hidden_size=32, num_attention_heads=4)
    config = ModelConfig(
        vocab_size=VOCABULARY + 128,
        sequence_length=64,
        block_decoder=stack,
        token_decoder=stack,
        initializer_std=0.4,
    )
    folder = tmp_path_factory.mktemp("run")
    start_single_process()
    try:
        save_model(folder / "checkpoints", 9, build_stage(config, ParallelConfig()), {"path": str(shards)})
    finally:
        torch.distributed.destroy_process_group()
    return folder


def test_the_prompt_and_its_continuation(generate: Generate, run_folder: Path) -> None:
    first = generate(run_folder)
    assert (first.status, first.errors) == (0, [])
    assert first.output.startswith(PROMPT)
    assert len(first.output) > len(PROMPT) + 6
    assert generate(run_folder / "checkpoints" / "step_00000009") == first
    shorter = generate(run_folder, tokens=5).output.removesuffix("\n")
    assert shorter != PROMPT
    assert first.output.startswith(shorter.rstrip("\N{REPLACEMENT CHARACTER}"))
    drawn = [generate(run_folder, "--temperature", "1", "--top-p", "0.9", "--seed", seed) for seed in "112"]
    assert drawn[0] == drawn[1] != drawn[2]


def test_from_another_folder_as_a_process(generate: Generate, run_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "--checkpoint", run_folder, "--prompt", PROMPT, "--max-new-tokens", "12"]
    result = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (0, generate(run_folder).output, "")


@pytest.mark.slow
def test_whoever_reads_may_stop(run_folder: Path) -> None:
    command = [sys.executable, SCRIPT, "--checkpoint", run_folder, "--prompt", PROMPT, "--max-new-tokens", "100000"]
    with subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(4) == PROMPT[:4]
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()
        assert process.wait(timeout=60) == -signal.SIGPIPE


def test_beyond_the_trained_length_one_line_warns(generate: Generate, run_folder: Path) -> None:
    result = generate(run_folder, tokens=70)
    assert result.status == 0
    assert len(result.errors) == 1
    assert result.errors[0].startswith("warning: prompt and new tokens")


def test_mistakes_are_one_line_and_status_2(generate: Generate, run_folder: Path, tmp_path: Path, shards: Path) -> None:
    other = prepare_small_corpus(tmp_path / "other", start=40_000) / "tokenizer.model"
    mistakes = {
        "missing is not a folder": generate(tmp_path / "missing"),
        "holds no checkpoint": generate(tmp_path),
        "gives no token": generate(run_folder, prompt=""),
        "max_new_tokens=-1": generate(run_folder, tokens=-1),
        "temperature=-1.0 is not allowed": generate(run_folder, "--temperature", "-1"),
        "top_p=0.0 is not allowed": generate(run_folder, "--top-p", "0"),
        "the prompt is not UTF-8 text at character 3": generate(run_folder, prompt="caf\udce9"),
        "tokens, and the model was trained on model.sequence_length=64; give a shorter one": generate(
            run_folder, prompt="word " * 70
        ),
        "is not the tokenizer that the model was trained with": generate(run_folder, "--tokenizer", str(other)),
        "none.model does not exist": generate(run_folder, "--tokenizer", str(tmp_path / "none.model")),
    }
    for expected, outcome in mistakes.items():
        assert (outcome.status, outcome.output) == (2, ""), expected
        assert len(outcome.errors) == 1, outcome.errors
        assert outcome.errors[0].startswith("error: ")
        assert expected in outcome.errors[0]


def test_without_the_training_data_a_tokenizer_must_be_given(
    generate: Generate, run_folder: Path, shards: Path, tmp_path: Path
) -> None:
    expected = generate(run_folder)
    moved = tmp_path / "moved"
    shards.rename(moved)
    try:
        outcome = generate(run_folder)
        assert (outcome.status, outcome.output, len(outcome.errors)) == (2, "", 1)
        assert "give it with --tokenizer FILE" in outcome.errors[0]
        assert generate(run_folder, "--tokenizer", str(moved / "tokenizer.model")) == expected
    finally:
        moved.rename(shards)


def test_a_prompt_from_a_file_or_standard_input(
    generate: Generate, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generate(run_folder).output
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT)
    assert generate(run_folder, "--prompt-file", str(file), prompt=None).output == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode())))
    assert generate(run_folder, prompt=None).output == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"It was \xff")))
    wrong = generate(run_folder, prompt=None)
    assert (wrong.status, len(wrong.errors)) == (2, 1)
    assert wrong.errors[0].startswith("error: the standard input cannot be read as UTF-8 text")
    missing = generate(run_folder, "--prompt-file", str(tmp_path / "none"), prompt=None)
    assert missing.status == 2
    assert "--prompt-file" in missing.errors[0]


def test_a_person_is_asked_again_after_a_bad_prompt(
    generate: Generate, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter(["word " * 200, PROMPT])

    def ask(question: str) -> str:
        try:
            return next(answers)
        except StopIteration:
            raise EOFError from None

    expected = generate(run_folder).output
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", ask)
    outcome = generate(run_folder, prompt=None)
    assert outcome.status == 0
    assert outcome.output == expected
    assert [line for line in outcome.errors if line.startswith("error: the prompt has")]


def test_bfloat16_on_request(generate: Generate, run_folder: Path) -> None:
    outcome = generate(run_folder, "--precision", "bf16")
    assert outcome.status == 0
    assert outcome.output.startswith(PROMPT)


def test_statistics_are_one_line(generate: Generate, run_folder: Path) -> None:
    outcome = generate(run_folder, "--stats", "--temperature", "1", "--top-k", "3")
    assert re.fullmatch(
        r"\d+ prompt tokens, first new token after [\d.]+ s, then .* tokens/s; 12 tokens in .* s", outcome.errors[-1]
    )
