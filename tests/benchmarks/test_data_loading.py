"""benchmarks/data_loading.py measures what it says, on a small scale."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import data_loading
from data.streaming.stream import SequenceStream
from tests.data.builders import numbered_documents, write_split


@pytest.mark.slow
def test_everything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_split(tmp_path / "shards", numbered_documents([1500] * 40), shard_tokens=20_000)
    options = ["--shards", str(tmp_path / "shards"), "--output", str(tmp_path / "output")]
    options += ["--scale", "0.002", "--rounds", "1", "--seconds", "0.05"]
    monkeypatch.setattr(sys, "argv", [data_loading.__file__, *options])
    data_loading.main()
    results = json.loads((tmp_path / "output" / "data_loading.json").read_text())
    assert all(speed["median"] > 0 for speed in results["million tokens per second"].values())
    assert results["full scale"]["shards"] == 8
    assert len(capsys.readouterr().out.splitlines()) == 4 + 4 + 1 + 6


def test_webdataset_reads_the_same_tokens(tmp_path: Path) -> None:
    """So the comparison is of like with like."""
    write_split(tmp_path, numbered_documents([1500] * 40), shard_tokens=100_000)
    ours = data_loading.open_stream(tmp_path, padding=False)
    assert isinstance(ours, SequenceStream)
    expected = {tuple(row) for row in ours.read(0, ours.sequences_per_epoch).token_ids.tolist()}
    batches = data_loading.webdataset_batches(tmp_path)
    found = {tuple(row) for _ in range(len(expected) // 8) for row in next(batches)[0].tolist()}
    assert found <= expected
    assert len(found) == len(expected) // 8 * 8
