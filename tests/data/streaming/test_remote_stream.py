"""Streams over HTTP from a faulty server are those of the directory that it serves."""

import functools
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.config import CacheConfig, DataConfig
from data.errors import DataError
from data.manifest import Manifest
from data.streaming.remote_files import RemoteFiles
from data.streaming.stream import SequenceStream
from tests.data.builders import numbered_documents, write_split
from tests.data.streaming.faulty_server import FaultyServer

LENGTHS = np.random.default_rng(0).integers(1, 40, 100).tolist()


@pytest.fixture
def manifest(server: FaultyServer) -> Manifest:
    """A served corpus of about ten shards."""
    return write_split(server.folder, numbered_documents(LENGTHS))


@pytest.fixture
def open_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., SequenceStream]:
    patient = functools.partial(RemoteFiles, first_wait_seconds=0.01)
    monkeypatch.setattr("data.streaming.remote_files.RemoteFiles", patient)

    def open_it(location: str, *, attempts: int = 8, stall_seconds: float = 20.0, **settings: object) -> SequenceStream:
        caching = CacheConfig(directory=tmp_path / "cache", stall_seconds=stall_seconds, attempts=attempts)
        config = DataConfig(path=location, cache=caching, shuffle_window_shards=3, **settings)
        return SequenceStream(config, "train", block_length=4, sequence_length=16)

    return open_it


@pytest.mark.slow
def test_every_fault_leaves_the_sequences_as_they_are(
    server: FaultyServer, manifest: Manifest, open_stream: Callable[..., SequenceStream]
) -> None:
    faults = ["stall", "cut", "busy", "wrong", "short", "missing"]
    names = [name for record in manifest.shards for name in (record.file, record.lengths_file)]
    server.faults = {f"train/{name}": [faults[number % 6], "cut"] for number, name in enumerate(names)}
    server.faults |= {"train/manifest.json": ["stall", "busy"], "tokenizer.model": ["cut"]}
    remote, local = open_stream(server.url, stall_seconds=0.3), open_stream(str(server.folder))
    assert remote.identity == local.identity
    for position, count in ((0, 1), (1, local.sequences_per_epoch), (7, 3)):
        expected, found = local.read(position, count), remote.read(position, count)
        np.testing.assert_array_equal(found.token_ids, expected.token_ids)
        np.testing.assert_array_equal(found.mask, expected.mask)
    assert not any(server.faults.values())
    # A process that starts later reads what this one fetched, but for what may change.
    before = server.requests.copy()
    again = open_stream(server.url)
    np.testing.assert_array_equal(again.read(5, 50).token_ids, local.read(5, 50).token_ids)
    assert set(server.requests - before) == {"train/manifest.json", "tokenizer.model"} | {
        name for name in server.requests if name.startswith("counts/")
    }


def test_a_shard_that_cannot_be_fetched_ends_the_run_or_is_left_out(
    server: FaultyServer, manifest: Manifest, open_stream: Callable[..., SequenceStream]
) -> None:
    count = open_stream(str(server.folder)).sequences_per_epoch
    (server.folder / "train" / manifest.shards[4].file).unlink()
    with pytest.raises(DataError, match=r"shard-00004.tar cannot be fetched from http.*\(2 attempts\)"):
        open_stream(server.url, attempts=2).read(0, count)
    skipping = open_stream(server.url, attempts=2, bad_shards="skip")
    rows = [sample.shard == 4 for sample in skipping.sample_ids(0, count)]
    assert 0 < sum(rows) < count
    np.testing.assert_array_equal(skipping.read(0, count).mask.any(axis=1), ~np.asarray(rows))


def test_shards_come_before_they_are_read(
    server: FaultyServer, manifest: Manifest, open_stream: Callable[..., SequenceStream]
) -> None:
    stream = open_stream(server.url, shuffle=False)
    read = {sample.shard for sample in stream.sample_ids(0, 1)}
    stream.read(0, 1)
    names = {f"train/{record.file}" for index, record in enumerate(manifest.shards) if index not in read}
    deadline = time.monotonic() + 60
    while not names <= server.requests.keys():
        assert time.monotonic() < deadline, "nothing was fetched ahead"
        time.sleep(0.01)


def test_a_split_that_is_not_there(server: FaultyServer, open_stream: Callable[..., SequenceStream]) -> None:
    with pytest.raises(DataError, match=rf"{server.url} has no train split: train/manifest.json is missing"):
        open_stream(server.url)
    assert server.requests == {"train/manifest.json": 1}
