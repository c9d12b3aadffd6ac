import functools
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data.config import CacheConfig
from data.errors import DataError, MissingFileError
from data.manifest import Manifest
from data.streaming.corpus_files import FileIdentity, LocalFiles, lengths_of, open_corpus, tar_of
from data.streaming.remote_files import RemoteFiles
from tests.data.builders import numbered_documents, write_split
from tests.data.streaming.faulty_server import STALL_SECONDS, FaultyServer


@pytest.fixture
def manifest(server: FaultyServer) -> Manifest:
    """A served corpus of six shards, all of whose files differ."""
    return write_split(server.folder, numbered_documents(range(100, 112)), shard_tokens=150)


def files_of(manifest: Manifest) -> list[FileIdentity]:
    return [identify("train", record) for record in manifest.shards for identify in (lengths_of, tar_of)]


@pytest.fixture
def open_remote(server: FaultyServer, tmp_path: Path) -> Callable[..., RemoteFiles]:
    def open_it(location: str = server.url, stall_seconds: float = 20.0, **settings: object) -> RemoteFiles:
        config = CacheConfig(directory=tmp_path / "cache", stall_seconds=stall_seconds, **settings)
        return RemoteFiles(location, config, first_wait_seconds=0.01)

    return open_it


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_all_kinds_of_files(server: FaultyServer, manifest: Manifest, open_remote: Callable[..., RemoteFiles]) -> None:
    server.faults["train/manifest.json"] = ["cut", "busy"]
    server.faults["train/shard-00000.tar"] = ["wrong", "short", "stall"]
    files = open_remote(stall_seconds=STALL_SECONDS)
    files.check_sizes(files_of(manifest))
    for name in ("train/manifest.json", "tokenizer.model", "train/manifest.json"):
        assert files.metadata(name).read_bytes() == (server.folder / name).read_bytes()
        assert files.metadata(name).name == Path(name).name
    for file in files_of(manifest):
        assert files.path(file).read_bytes() == (server.folder / file.name).read_bytes()
    assert [files.optional_metadata("counts/none.json") for _ in range(2)] == [None, None]
    assert server.requests.pop("train/manifest.json") == 3
    assert server.requests.pop("train/shard-00000.tar") == 4
    assert set(server.requests.values()) == {1}
    with pytest.raises(DataError, match=r"validation/manifest.json cannot be fetched .* 404 .*\(1 attempt\)"):
        files.metadata("validation/manifest.json")


def test_another_process_has_the_shards_and_the_newest_metadata(
    server: FaultyServer, manifest: Manifest, open_remote: Callable[..., RemoteFiles]
) -> None:
    for content in (b"before", b"after"):
        (server.folder / "note").write_bytes(content)
        files = open_remote()
        assert files.metadata("note").read_bytes() == content
        files.path(files_of(manifest)[0])
    assert server.requests == {"note": 2, files_of(manifest)[0].name: 1}


def test_what_a_command_cannot_find_may_be_missing(open_remote: Callable[..., RemoteFiles], tmp_path: Path) -> None:
    files = open_remote(f"pipe:echo {{file}} >> {tmp_path}/log; cat {tmp_path}/{{file}} 2>/dev/null", attempts=2)
    assert files.optional_metadata("nothing") is None
    with pytest.raises(MissingFileError, match=r"the command ended with status 1 \(2 attempts\)"):
        files.metadata("something")
    assert (tmp_path / "log").read_text().split() == ["nothing", "something", "something"]


def test_prefetching_brings_everything_in_order(
    server: FaultyServer, manifest: Manifest, open_remote: Callable[..., RemoteFiles]
) -> None:
    server.faults[files_of(manifest)[2].name] = ["cut"]
    files = open_remote()
    files.prefetch(files_of(manifest))
    names = [file.name for file in files_of(manifest)]
    wait_until(lambda: sum(server.requests.values()) == len(names) + 1 and files._prefetcher._wishes == [])
    assert list(server.requests) == names
    for file in files_of(manifest):
        assert files.path(file).stat().st_size == file.bytes
    assert sum(server.requests.values()) == len(names) + 1


def test_the_newest_wish_counts_and_failures_are_left_to_the_reader(
    server: FaultyServer, manifest: Manifest, open_remote: Callable[..., RemoteFiles]
) -> None:
    wanted = files_of(manifest)
    server.faults[wanted[0].name] = ["stall"] * 4
    files = open_remote(attempts=2, stall_seconds=STALL_SECONDS)
    files.prefetch(wanted[:6])
    wait_until(lambda: server.requests[wanted[0].name])
    files.prefetch([wanted[0], wanted[8]])
    wait_until(lambda: server.requests[wanted[8].name])
    assert set(server.requests) == {wanted[0].name, wanted[8].name}
    assert server.requests[wanted[0].name] == 4
    assert files.path(wanted[0]).stat().st_size == wanted[0].bytes


def test_a_forked_child_prefetches_by_itself(
    server: FaultyServer, manifest: Manifest, open_remote: Callable[..., RemoteFiles]
) -> None:
    files, wanted = open_remote(), files_of(manifest)
    files.prefetch(wanted[:2])
    wait_until(lambda: len(server.requests) == 2)
    child = os.fork()
    if child == 0:
        files.prefetch(wanted[2:4])
        time.sleep(20)
        os._exit(1)
    wait_until(lambda: len(server.requests) == 4)
    os.kill(child, 9)
    os.waitpid(child, 0)


def test_a_metadata_folder_that_cannot_be_written(
    server: FaultyServer, manifest: Manifest, open_remote: Callable[..., RemoteFiles], tmp_path: Path
) -> None:
    files = open_remote()
    (tmp_path / "cache" / "block-transformer-cache" / "metadata").touch()
    with pytest.raises(
        DataError, match=r"tokenizer.model cannot be written: Not a directory; .*set data.cache.directory"
    ):
        files.metadata("tokenizer.model")


def test_locations_decide_how_a_corpus_is_opened(
    server: FaultyServer, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    opened = functools.partial(open_corpus, cache=CacheConfig())
    for location in (str(server.folder), f"file://{server.folder}"):
        local = opened(location)
        assert isinstance(local, LocalFiles)
        assert local.location == str(server.folder)
    assert isinstance(opened(server.url), RemoteFiles)
    assert (tmp_path / "home" / "block-transformer" / "shards").is_dir()
    for location in ("http://[::1/x", "file://[::1/x"):
        with pytest.raises(DataError, match=r"^data.path .*\[::1/x is a malformed URL"):
            opened(location)


@pytest.mark.usefixtures("no_home")
def test_without_a_home_directory_the_cache_must_be_set(
    server: FaultyServer, open_remote: Callable[..., RemoteFiles]
) -> None:
    open_remote()
    with pytest.raises(DataError, match=r"^no home directory is known here, so data.cache.directory must be set"):
        RemoteFiles(server.url, CacheConfig())


def test_signatures_share_metadata_and_contents_do_not(
    server: FaultyServer, open_remote: Callable[..., RemoteFiles], tmp_path: Path
) -> None:
    (server.folder / "train").mkdir()
    note = server.folder / "train" / "note"
    note.write_bytes(b"before")
    first, second = (open_remote(f"{server.url}?signature={number}") for number in (1, 2))
    path = first.metadata("train/note")
    assert second.metadata("train/note") == path
    assert len(list((tmp_path / "cache" / "block-transformer-cache" / "metadata").iterdir())) == 1
    note.write_bytes(b"after")
    assert open_remote(server.url).metadata("train/note").read_bytes() == b"after"
    assert path.read_bytes() == b"before"


def test_what_lies_in_the_configured_directory_stays(
    server: FaultyServer, manifest: Manifest, open_remote: Callable[..., RemoteFiles], tmp_path: Path
) -> None:
    wanted = files_of(manifest)[0]
    (tmp_path / "cache").mkdir()
    foreign = [tmp_path / "cache" / name for name in ("thesis.tex", "a" * 64, "b" * 64 + ".part", "lock")]
    for path in foreign:
        path.write_bytes(b"precious" * 1000)
        os.utime(path, (0, 0))
    open_remote(gibibytes=wanted.bytes / 2**30).path(wanted)
    assert {path.read_bytes() for path in foreign} == {b"precious" * 1000}
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {
        "block-transformer-cache",
        *(path.name for path in foreign),
    }
