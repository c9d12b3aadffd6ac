"""tools/convert_checkpoint.py as a user runs it, on small models; and generation from what was imported."""

import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed

from checkpoints.errors import CheckpointError
from checkpoints.store import CheckpointStore
from tests.checkpoints.weights.models import same_tensors, save_transformers
from tests.train.small_run import VOCABULARY, prepare_small_corpus
from train.checkpointing import progress_of

TOOLS = Path(__file__).resolve().parents[2] / "tools"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a tool in this process, which has imported everything; gives status, output and errors."""

    def call(tool: str, *arguments: object) -> tuple[int, str, str]:
        script = str(TOOLS / f"{tool}.py")
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        before = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(script, run_name="__main__")
        finally:
            signal.signal(signal.SIGTERM, before)
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Pythia-like model whose tokenizer lies beside it."""
    folder = tmp_path_factory.mktemp("source")
    save_transformers(folder, "GPTNeoX", torch.bfloat16, vocab_size=VOCABULARY)
    shards = prepare_small_corpus(tmp_path_factory.mktemp("corpus"))
    tokenizer = next(iter(shards.glob("*.model")))
    (folder / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    return folder


def test_there_and_back_and_generation_between(run: Run, source: Path, tmp_path: Path) -> None:
    status, output, _ = run("convert_checkpoint", source, tmp_path / "ours")
    assert status == 0
    lines = output.splitlines()
    assert lines[0].startswith(f"gpt_neox model {source}: ")
    assert lines[-2].startswith("largest logit difference ")
    assert lines[-1] == f"wrote {tmp_path}/ours"
    status, output, _ = run(
        "generate", "--checkpoint", tmp_path / "ours", "--prompt", "It was a", "--max-new-tokens", 8
    )
    assert status == 0
    assert output.startswith("It was a")
    status, output, _ = run("convert_checkpoint", tmp_path / "ours", tmp_path / "back")
    assert status == 0
    assert same_tensors(source / "model.safetensors", tmp_path / "back" / "model.safetensors")
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()


def test_an_import_without_tokenizer_and_data_is_explained(run: Run, source: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((source / name).read_bytes())
    assert run("convert_checkpoint", bare, tmp_path / "ours")[0] == 0
    generate = ("generate", "--checkpoint", tmp_path / "ours", "--prompt", "It was a", "--max-new-tokens", 2)
    status, _, error = run(*generate)
    assert status == 2
    assert "imported without a tokenizer; give it with --tokenizer FILE" in error
    assert run(*generate, "--tokenizer", source / "tokenizer.model")[0] == 0
    status, _, error = run("evaluate_model", "--checkpoint", tmp_path / "ours")
    assert status == 2
    assert "was imported, so it has no validation split of its own" in error


def test_mistakes_are_one_line_and_leave_nothing(run: Run, source: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for arguments, message in [
        ((tmp_path / "missing", tmp_path / "new"), "missing is not a folder"),
        ((source, tmp_path / "there"), "there exists; name a new folder"),
        ((source, tmp_path / "new", "--to", "reference"), "the reference code has no model with architecture=vanilla"),
        ((source, tmp_path / "new", "--tokenizer", source / "config.json"), "config.json"),
        ((source, tmp_path / "new", "--dtype", "float16"), "--dtype does not go with --to ours"),
        ((source, tmp_path / "new", "--config", source / "none.yaml"), "none.yaml cannot be read as YAML"),
        ((source, tmp_path / "new", "--sequence-length", "1"), "--sequence-length 1 is too short"),
    ]:
        status, _, error = run("convert_checkpoint", *arguments)
        assert status == 2, message
        assert message in error
        assert error.strip().count("\n") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_no_run_goes_on_from_imported_weights(run: Run, source: Path, tmp_path: Path) -> None:
    assert run("convert_checkpoint", source, tmp_path / "ours")[0] == 0
    checkpoint = CheckpointStore(tmp_path / "ours" / "checkpoints").newest()
    assert checkpoint is not None
    with pytest.raises(CheckpointError, match=r"holds imported weights .* choose another run\.name"):
        progress_of(checkpoint)


@pytest.mark.slow
def test_an_interruption_leaves_nothing_half_made(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, TOOLS / "convert_checkpoint.py", source, tmp_path / "ours"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.iterdir()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert "Traceback" not in errors
    if process.returncode == 130:
        assert errors.splitlines()[-1] == "interrupted"
        assert list(tmp_path.iterdir()) == []
    else:  # it had finished before the signal came
        assert (process.returncode, [path.name for path in tmp_path.iterdir()]) == (0, ["ours"])


PEAK = """
import runpy, sys
sys.argv = ["convert_checkpoint.py", *sys.argv[1:]]
try:
    runpy.run_path(sys.argv.pop(1), run_name="__main__")
finally:
    status = open("/proc/self/status").read()  # getrusage counts the parent's memory before exec, too
    print("peak", status.split("VmHWM:")[1].split()[0])
"""


@pytest.mark.slow
def test_memory_stays_near_one_copy_of_the_weights(tmp_path: Path) -> None:
    """Against the same program on a model of nothing. Two and a bit: mapped pages of the files that are compared count
    too. A second copy of the values while they are written is found."""
    peaks = {}
    for name, width, layers in (("nothing", 32, 1), ("large", 1024, 5)):
        save_transformers(
            tmp_path / name,
            "GPTNeoX",
            torch.bfloat16,
            vocab_size=1024,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=width // 16,
            intermediate_size=4 * width,
        )
        command = [
            sys.executable,
            "-c",
            PEAK,
            TOOLS / "convert_checkpoint.py",
            tmp_path / name,
            tmp_path / f"our-{name}",
        ]
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, check=True)
        peaks[name] = 1024 * int(result.stdout.split("peak ")[1])
    copy = 4 * (5 * 12 * 1024**2 + 2 * 1024**2)
    assert peaks["large"] - peaks["nothing"] < 2.25 * copy
