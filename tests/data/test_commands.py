"""The two commands as a person runs them; each run is a process of its own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data.manifest import read_manifest
from data.preparation.documents import read_documents
from tests.data.builders import intact_shards
from tests.data.preparation.reading import files

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def command(tool: str, *arguments: object) -> list[str]:
    return [sys.executable, str(TOOLS / tool), *map(str, arguments)]


def run(tool: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(tool, *arguments), cwd=cwd, capture_output=True, text=True, timeout=120)


def test_train_then_prepare_from_another_folder(corpus_file: Path, tmp_path: Path) -> None:
    trained = run(
        "train_tokenizer.py", "--input", corpus_file, "--vocab-size", 330, "--output", "new/t.model", cwd=tmp_path
    )
    assert trained.returncode == 0, trained.stderr
    assert "330 tokens" in trained.stdout
    pattern = corpus_file.parent / "*.jsonl"
    arguments = ("--input", pattern, "--output", "shards", "--tokenizer", "new/t.model", "--text-field", "text")
    arguments += ("--min-tokens", 2, "--on-malformed", "skip", "--remove-duplicates", "--shuffle-documents", 7)
    prepared = run("prepare_data.py", *arguments, "--validation-fraction", 0.1, "--workers", 2, cwd=tmp_path)
    assert prepared.returncode == 0, prepared.stderr
    assert prepared.stderr == ""
    assert "bytes per token" in prepared.stdout
    assert read_manifest(tmp_path / "shards" / "train").documents > 40
    again = run("prepare_data.py", *arguments, "--validation-fraction", 0.1, cwd=tmp_path)
    assert again.returncode == 0
    assert "already prepared" in again.stdout


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no document"),
        ("a.txt", b"a\0b", "line 1: NUL character"),
        ("a.txt", b"\xff", "line 1: byte 0xff is not valid UTF-8"),
        ("a.jsonl", b'{"body": "a"}', 'line 1: no "text" field'),
        ("a.jsonl", b"{", "line 1: malformed JSON"),
    ],
)
def test_bad_input_gives_one_line_and_status_2(
    sentencepiece_file: Path, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    for result in (
        run("prepare_data.py", "--input", path, "--output", "s", "--tokenizer", sentencepiece_file, cwd=tmp_path),
        run("train_tokenizer.py", "--input", path, "--vocab-size", 330, "--output", "t.model", cwd=tmp_path),
    ):
        assert result.returncode == 2
        assert result.stderr.startswith("error: ")
        assert str(path) in result.stderr
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
        assert result.stdout == ""
    assert [found.name for found in tmp_path.iterdir()] == [name]


def test_bad_tokenizer_and_occupied_output(corpus_file: Path, sentencepiece_file: Path, tmp_path: Path) -> None:
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "file").touch()
    for tokenizer, output, message in (
        ("absent.model", "s", "error: tokenizer file absent.model does not exist"),
        (sentencepiece_file, "occupied", "was not made by this command; give another --output"),
    ):
        result = run(
            "prepare_data.py", "--input", corpus_file, "--output", output, "--tokenizer", tokenizer, cwd=tmp_path
        )
        assert result.returncode == 2
        assert message in result.stderr
        assert "Traceback" not in result.stderr


class Preparation:
    """A running preparation of two workers that takes far longer than any test waits."""

    def __init__(self, folder: Path, corpus_file: Path, tokenizer: Path, copies: int) -> None:
        large = folder / "large.jsonl"
        large.write_bytes(corpus_file.read_bytes() * copies)
        self.folder = folder
        self.arguments = ("--input", large, "--output", "shards", "--tokenizer", tokenizer, "--shard-tokens", 10_000)
        self.process = subprocess.Popen(
            command("prepare_data.py", *self.arguments, "--workers", 2),
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    @property
    def finished_shards(self) -> list[Path]:
        return sorted(self.folder.glob(".shards.partial/output/train/*.tar"))

    def members(self) -> set[int]:
        """Living processes of the session: the preparation and its workers."""
        found = set()
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[3]) == self.process.pid and fields[0] != "Z":
                found.add(int(stat.parent.name))
        return found


# A test that lets the preparation end needs a shorter one; both outlast an interruption on a loaded machine.
@pytest.fixture(params=[2000])
def preparation(
    request: pytest.FixtureRequest, tmp_path: Path, corpus_file: Path, sentencepiece_file: Path
) -> Iterator[Preparation]:
    started = Preparation(tmp_path, corpus_file, sentencepiece_file, copies=request.param)
    yield started
    for process in started.members():
        os.kill(process, signal.SIGKILL)
    started.process.communicate()


def wait_for(condition: Callable[[], object]) -> None:
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("waited for half a minute")


def interrupt(preparation: Preparation, send: Callable[[], None]) -> str:
    wait_for(lambda: len(preparation.finished_shards) >= 2)
    assert len(preparation.members()) >= 3
    send()
    _, errors = preparation.process.communicate(timeout=30)
    wait_for(lambda: not preparation.members())
    assert not (preparation.folder / "shards").exists()
    return errors


@pytest.mark.parametrize("preparation", [400], indirect=True)
def test_a_killed_preparation_leaves_no_output_and_the_next_run_goes_on(preparation: Preparation) -> None:
    """Takes seconds: three whole preparations."""
    interrupt(preparation, preparation.process.kill)
    kept = {path.name: path.stat().st_mtime_ns for path in preparation.finished_shards}
    assert kept
    result = run("prepare_data.py", *preparation.arguments, cwd=preparation.folder)
    assert result.returncode == 0, result.stderr
    output = preparation.folder / "shards"
    assert intact_shards(output) > len(kept)
    # The journal knows all finished shards, except perhaps the one that was being entered.
    reused = [name for name, changed in kept.items() if (output / "train" / name).stat().st_mtime_ns == changed]
    assert len(reused) >= len(kept) - 1
    whole = tuple("whole" if argument == "shards" else argument for argument in preparation.arguments)
    assert run("prepare_data.py", *whole, cwd=preparation.folder).returncode == 0
    assert files(output) == files(preparation.folder / "whole")
    assert not list(preparation.folder.glob(".*"))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_all_processes(preparation: Preparation, number: signal.Signals, status: int) -> None:
    """Ctrl-C reaches the whole process group, a scheduler's SIGTERM often only the first process."""
    whole_group = number == signal.SIGINT
    target = os.killpg if whole_group else os.kill
    errors = interrupt(preparation, lambda: target(preparation.process.pid, number))
    assert preparation.process.returncode == status
    assert "Traceback" not in errors
    assert not list(preparation.folder.glob(".shards.partial/**/*.tmp"))


def test_two_preparations_of_one_output_exclude_each_other(preparation: Preparation) -> None:
    wait_for(lambda: preparation.finished_shards)
    result = run("prepare_data.py", *preparation.arguments, cwd=preparation.folder)
    assert result.returncode == 2
    assert "another process is preparing this output" in result.stderr


def test_a_dead_worker_is_reported(preparation: Preparation) -> None:
    wait_for(lambda: preparation.finished_shards)
    children = Path(f"/proc/{preparation.process.pid}/task/{preparation.process.pid}/children").read_text().split()
    workers = [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    os.kill(workers[0], signal.SIGKILL)
    _, errors = preparation.process.communicate(timeout=30)
    assert preparation.process.returncode == 2
    assert errors.startswith("error: a worker was killed")
    wait_for(lambda: not preparation.members())


def test_the_example_corpus_is_what_its_readme_says() -> None:
    folder = TOOLS.parent / "examples" / "corpus"
    readme = (folder / "README.md").read_text()
    sizes = {}
    for split in ("train", "validation"):
        documents = list(read_documents(folder / f"{split}.jsonl.xz"))
        sizes[split] = sum(map(len, documents))
        rows = [line for line in readme.splitlines() if line.endswith(f"| {split} |")]
        assert sorted(f"{len(document):,}" for document in documents) == sorted(row.split(" | ")[3] for row in rows)
    assert 4_000_000 < sizes["train"] < 8_000_000
    assert 300_000 < sizes["validation"] < 600_000
