"""The count table: made once, in parallel, on from an interruption; with it a corpus of any size opens at once."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.data_loading import BATCH, DOCUMENTS, SHARDS, TOKENS, open_stream
from benchmarks.synthetic_corpus import write_synthetic_corpus
from data.errors import DataError
from data.manifest import Manifest
from data.streaming.counts import PACKING_VERSION, SHARDS_WORTH_REPORTING, packing_key
from data.streaming.packing import PackingSettings

REPOSITORY = Path(__file__).resolve().parents[3]
OPEN = "import sys; from benchmarks.data_loading import open_stream; open_stream(sys.argv[1])"
# Opens, seeks to a share of the epoch and reads a batch; prints the growth of the resident memory in bytes.
MEMORY = """
import sys, psutil
from benchmarks.data_loading import BATCH, open_stream
before = psutil.Process().memory_info().rss
stream = open_stream(sys.argv[1])
stream.read(int(float(sys.argv[2]) * stream.sequences_per_epoch), BATCH)
print(psutil.Process().memory_info().rss - before)
"""


def python(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", code, *map(str, arguments)]


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        python(code, *arguments), cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def synthetic(root: Path, scale: float) -> Manifest:
    return write_synthetic_corpus(
        root, shards=int(SHARDS * scale), documents=int(DOCUMENTS * scale), tokens=int(TOKENS * scale)
    )


def test_an_interrupted_table_is_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = write_synthetic_corpus(tmp_path / "corpus", shards=100, documents=5_000, tokens=3_000_000)
    sidecar = tmp_path / "corpus" / "train" / manifest.shards[90].lengths_file
    content = sidecar.read_bytes()
    sidecar.write_bytes(b"")
    with pytest.raises(DataError, match=rf"{sidecar.name} has 0 bytes"):
        open_stream(tmp_path / "corpus")
    (table,) = (tmp_path / "corpus" / "counts").glob("*.json")
    lengths = json.loads(table.read_text())["packed_lengths"]
    known = sum(length >= 0 for length in lengths)
    assert 0 < known < 100
    assert lengths[90] == -1
    sidecar.write_bytes(content)
    capsys.readouterr()
    stream = open_stream(tmp_path / "corpus")
    errors = capsys.readouterr().err
    assert (f"; {known} are known" in errors) == (100 - known >= SHARDS_WORTH_REPORTING)
    table.unlink()
    assert open_stream(tmp_path / "corpus").sample_ids(0, 99) == stream.sample_ids(0, 99)
    assert "counting the sequences of 100 shards" in capsys.readouterr().err


def test_a_table_belongs_to_one_packing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever changes packing makes another key, so that no table of an earlier packing is used."""
    manifest = write_synthetic_corpus(tmp_path / "corpus", shards=2, documents=20, tokens=3_000)
    fewer = manifest.model_copy(update={"shards": manifest.shards[:1]})
    settings = [
        PackingSettings(4, True, True, 0),
        PackingSettings(2, True, True, 0),
        PackingSettings(4, False, True, 0),
    ]
    settings += [PackingSettings(4, True, False, 0), PackingSettings(4, True, True, 1)]
    keys = [packing_key(manifest, each) for each in settings] + [packing_key(fewer, settings[0])]
    assert packing_key(manifest, settings[0]) == keys[0]
    monkeypatch.setattr("data.streaming.counts.PACKING_VERSION", PACKING_VERSION + 1)
    keys.append(packing_key(manifest, settings[0]))
    assert len(set(keys)) == len(keys)


@pytest.mark.usefixtures("no_home")
def test_without_a_home_directory_the_table_is_made_all_the_same(tmp_path: Path) -> None:
    write_synthetic_corpus(tmp_path / "corpus", shards=2, documents=200, tokens=90_000)
    samples = open_stream(tmp_path / "corpus").sample_ids(0, 9)
    (table,) = (tmp_path / "corpus" / "counts").glob("*.json")
    for path in table.parent.iterdir():
        path.unlink()
    table.parent.rmdir()
    table.parent.touch()  # Unwritable for everybody, also for root.
    assert open_stream(tmp_path / "corpus").sample_ids(0, 9) == samples


def test_one_process_makes_the_table_and_the_others_wait(tmp_path: Path) -> None:
    write_synthetic_corpus(tmp_path / "corpus", shards=100, documents=5_000, tokens=3_000_000)
    open_stream(tmp_path / "corpus")
    (lock,) = (tmp_path / "corpus" / "counts").glob(".*.lock")
    (table,) = (tmp_path / "corpus" / "counts").glob("*.json")
    made = table.read_bytes()
    table.unlink()
    with open(lock, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        waiting = start(OPEN, tmp_path / "corpus")
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(timeout=3)
        table.write_bytes(made)
    _, errors = waiting.communicate(timeout=60)
    assert waiting.returncode == 0
    assert errors == "", "it has nothing left to count"


@pytest.mark.parametrize("scale", [0.05, pytest.param(1.0, marks=pytest.mark.whole)])
def test_a_corpus_of_any_size_opens_anywhere_in_little_memory(tmp_path: Path, scale: float) -> None:
    """At scale 1: 300B tokens, 134M documents, 4,000 shards."""
    synthetic(tmp_path / "corpus", scale)
    if scale == 1.0:
        kill_while_counting(tmp_path / "corpus")
    stream = open_stream(tmp_path / "corpus")
    assert stream.read(0, BATCH).mask.any()
    fresh, restored = (
        int(subprocess.check_output(python(MEMORY, tmp_path / "corpus", share), cwd=REPOSITORY)) for share in (0, 0.731)
    )
    assert fresh < 2**30
    assert restored < 2**30
    assert abs(restored - fresh) < 2**27
    # Nothing but the shards of the batch is opened: all others may be gone.
    position = int(0.731 * stream.sequences_per_epoch)
    needed = {sample.shard for sample in stream.sample_ids(position, BATCH)}
    expected = stream.read(position, BATCH)
    for path in (tmp_path / "corpus" / "train").glob("shard-*"):
        if int(path.name[6:11]) not in needed:
            path.unlink()
    assert (open_stream(tmp_path / "corpus").read(position, BATCH).mask == expected.mask).all()


def kill_while_counting(corpus: Path) -> None:
    counting = start(OPEN, corpus)
    while not list((corpus / "counts").glob("*.json")):
        assert counting.poll() is None, "the table was complete before the process could be killed"
        time.sleep(0.01)
    os.kill(counting.pid, signal.SIGKILL)
    counting.communicate()
    again = start(OPEN, corpus)
    _, errors = again.communicate(timeout=300)
    assert again.returncode == 0
    assert "are known" in errors
