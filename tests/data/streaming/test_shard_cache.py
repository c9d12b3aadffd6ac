"""Transfers are real (`cat` through a pipe); other processes are forked, because starting them anew takes long."""

import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data.errors import DataError
from data.streaming.corpus_files import FileIdentity
from data.streaming.shard_cache import GIBIBYTE, LOCK_NAME, ShardCache, Store
from data.streaming.transfer import Fetcher

SIZE = 100_000


class Corpus:
    """A folder of random files, and a log of their transfers."""

    def __init__(self, root: Path) -> None:
        (root / "corpus").mkdir()
        self.root = root
        self.contents = {f"file-{index}": os.urandom(SIZE) for index in range(6)}
        self.files = {}
        for name, content in self.contents.items():
            (root / "corpus" / name).write_bytes(content)
            self.files[name] = FileIdentity(name, SIZE, hashlib.sha256(content).hexdigest())

    def fetch(self, name: str, prefix: str = "", attempts: int = 3) -> Callable[[Store], None]:
        command = f"pipe:echo {{file}} >> {self.root}/log; {prefix}cat {self.root}/corpus/{{file}}"
        fetcher = Fetcher(command, attempts=attempts, stall_seconds=20, first_wait_seconds=0.01)
        return lambda store: fetcher.fetch(name, store, expected=True)

    @property
    def transfers(self) -> list[str]:
        return sorted((self.root / "log").read_text().split())


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return Corpus(tmp_path)


def open_cache(folder: Path, files: float = 100, grace_seconds: float = 0.0) -> ShardCache:
    return ShardCache(folder / "cache", files * SIZE / GIBIBYTE, grace_seconds)


def add(cache: ShardCache, corpus: Corpus, name: str) -> bytes:
    return cache.add(corpus.files[name], corpus.fetch(name)).read_bytes()


def in_child(function: Callable[[], object]) -> int:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            function()
            status = 0
        finally:
            os._exit(status)
    return child


def status_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def names_in(cache_folder: Path) -> set[str]:
    return {path.name for path in cache_folder.iterdir()} - {"lock"}


def test_a_file_is_fetched_once_and_equal_files_are_one(corpus: Corpus, tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    assert cache.find(corpus.files["file-0"]) is None
    for _ in range(2):
        assert add(cache, corpus, "file-0") == corpus.contents["file-0"]
    renamed = corpus.files["file-0"]._replace(name="elsewhere/other")
    assert open_cache(tmp_path).find(renamed) == tmp_path / "cache" / renamed.sha256
    assert corpus.transfers == ["file-0"]
    assert names_in(tmp_path / "cache") == {renamed.sha256}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (b"", "0 of 100000 bytes came"),
        (b"0" * (SIZE + 1), "more than its 100000 bytes came"),
        (b"0" * SIZE, "the content has checksum [0-9a-f]{64}, the manifest says"),
    ],
)
def test_wrong_content_is_a_broken_transfer(corpus: Corpus, tmp_path: Path, damage: bytes, message: str) -> None:
    cache, source = open_cache(tmp_path), tmp_path / "corpus" / "file-0"
    source.write_bytes(damage)
    with pytest.raises(DataError, match=rf"file-0 cannot be fetched .*{message}.*\(3 attempts\)"):
        add(cache, corpus, "file-0")
    assert names_in(tmp_path / "cache") == set()
    source.write_bytes(corpus.contents["file-0"])
    assert add(cache, corpus, "file-0") == corpus.contents["file-0"]


def test_processes_share_each_transfer(corpus: Corpus, tmp_path: Path) -> None:
    """All want all files at the same time, each in another order."""
    names = list(corpus.files)

    def read_all(first: int) -> None:
        cache = open_cache(tmp_path)
        for name in names[first:] + names[:first]:
            path = cache.add(corpus.files[name], corpus.fetch(name, "sleep 0.05; "))
            assert path.read_bytes() == corpus.contents[name]

    children = [in_child(lambda first=first: read_all(first)) for first in (0, 1, 0, 3)]
    assert [status_of(child) for child in children] == [0] * 4
    assert corpus.transfers == names


def kill_self(*arguments: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("point", ["posix_fallocate", "write", "fsync", "replace"])
def test_after_a_kill_another_process_goes_on(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """Also one that waits for the file just then."""
    cache = open_cache(tmp_path)

    def die_in_the_middle() -> None:
        def kill_when_awaited(*arguments: object) -> None:
            (tmp_path / "reached").touch()
            time.sleep(0.2)
            kill_self()

        setattr(os, point, kill_when_awaited)
        add(cache, corpus, "file-0")

    child = in_child(die_in_the_middle)
    while not (tmp_path / "reached").exists():
        time.sleep(0.005)
    assert add(cache, corpus, "file-0") == corpus.contents["file-0"]
    assert status_of(child) == -signal.SIGKILL
    assert names_in(tmp_path / "cache") == {corpus.files["file-0"].sha256}


def test_what_a_killed_process_left_is_removed(corpus: Corpus, tmp_path: Path) -> None:
    cache, left = open_cache(tmp_path, files=1), corpus.files["file-0"].sha256

    def die_before_the_end() -> None:
        os.fsync = kill_self  # type: ignore[assignment]
        add(cache, corpus, "file-0")

    assert status_of(in_child(die_before_the_end)) == -signal.SIGKILL
    assert names_in(tmp_path / "cache") == {f"{left}.part"}
    assert add(cache, corpus, "file-1") == corpus.contents["file-1"]
    assert names_in(tmp_path / "cache") == {corpus.files["file-1"].sha256}


def test_what_is_not_the_caches_own_is_neither_counted_nor_removed(corpus: Corpus, tmp_path: Path) -> None:
    cache, names = open_cache(tmp_path, files=1), list(corpus.files)
    folder, digest = tmp_path / "cache", "a" * 64
    (folder / digest).mkdir()
    foreign = [
        folder / name for name in ("thesis.pdf", "download.part", f"{digest[1:]}", f"{digest}.tar", f"A{digest[1:]}")
    ]
    for path in foreign:
        path.write_bytes(bytes(SIZE))
        os.utime(path, (0, 0))
    for name in names[:2]:
        assert add(cache, corpus, name) == corpus.contents[name]
    assert {path.stat().st_size for path in foreign} == {SIZE}
    assert names_in(folder) == {digest, corpus.files[names[1]].sha256, *(path.name for path in foreign)}


def test_what_was_used_longest_ago_makes_room(corpus: Corpus, tmp_path: Path) -> None:
    cache, names = open_cache(tmp_path, files=3.5), list(corpus.files)

    def use(number: int) -> Path:
        time.sleep(0.02)  # Times of files are as coarse as the kernel's clock.
        return cache.add(corpus.files[names[number]], corpus.fetch(names[number]))

    for number in range(3):
        use(number)
    with open(use(1), "rb") as opened:
        for number in (0, 3, 4):
            use(number)
        assert names_in(tmp_path / "cache") == {corpus.files[names[kept]].sha256 for kept in (0, 3, 4)}
        assert opened.read() == corpus.contents[names[1]]


def test_processes_keep_the_bound_and_no_path_vanishes_before_it_is_opened(corpus: Corpus, tmp_path: Path) -> None:
    """Room for two files, three readers: each use pushes out what another read just before."""

    def read_all(first: int) -> None:
        cache, names = open_cache(tmp_path, files=2, grace_seconds=0.1), list(corpus.files)
        for name in (names[first:] + names[:first]) * 2:
            while (content := read_in_time(cache, corpus, name)) is None:
                pass
            assert content == corpus.contents[name]

    children = [in_child(lambda first=first: read_all(first)) for first in (0, 2, 4)]
    largest = 0
    while children:
        largest = max(largest, size_of(tmp_path / "cache"))
        children = [child for child in children if not has_ended_well(child)]
        time.sleep(0.002)
    assert SIZE <= largest <= 2 * SIZE


def read_in_time(cache: ShardCache, corpus: Corpus, name: str) -> bytes | None:
    """None if this process was so slow that the path could vanish."""
    cache.add(corpus.files[name], corpus.fetch(name))
    asked = time.monotonic()
    path = cache.find(corpus.files[name])
    time.sleep(0.02)
    try:
        return path and path.read_bytes()
    except FileNotFoundError:
        assert time.monotonic() - asked > 0.09  # The kernel's clock for files is up to 0.01 s behind.
        return None


def size_of(folder: Path) -> int:
    if not (folder / LOCK_NAME).exists():
        return 0
    with open(folder / LOCK_NAME) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return sum(path.stat().st_size for path in folder.iterdir())


def has_ended_well(child: int) -> bool:
    ended, status = os.waitpid(child, os.WNOHANG)
    assert status == 0
    return bool(ended)


def test_fetching_ahead_removes_nothing_that_is_wanted(corpus: Corpus, tmp_path: Path) -> None:
    cache, names = open_cache(tmp_path, files=2), list(corpus.files)
    wanted = {corpus.files[name].sha256 for name in names[:3]}
    add(cache, corpus, names[5])
    done = [cache.add_ahead(corpus.files[name], corpus.fetch(name), wanted) for name in names[:3]]
    assert done == [True, True, False]
    assert names_in(tmp_path / "cache") == {corpus.files[name].sha256 for name in names[:2]}


def test_fetching_ahead_leaves_files_to_their_fetchers(corpus: Corpus, tmp_path: Path) -> None:
    cache, file = open_cache(tmp_path), corpus.files["file-0"]
    go = tmp_path / "go"
    child = in_child(lambda: cache.add(file, corpus.fetch("file-0", f"until [ -e {go} ]; do sleep 0.01; done; ")))
    while not (tmp_path / "log").exists():
        time.sleep(0.005)
    assert cache.add_ahead(file, corpus.fetch("file-0"), set())
    assert cache.find(file) is None
    go.touch()
    assert status_of(child) == 0
    assert cache.find(file) is not None
    assert corpus.transfers == ["file-0"]


def test_a_copy_that_lost_its_end_is_fetched_again(corpus: Corpus, tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    add(cache, corpus, "file-0")
    os.truncate(tmp_path / "cache" / corpus.files["file-0"].sha256, 5)
    assert add(cache, corpus, "file-0") == corpus.contents["file-0"]


def test_a_file_larger_than_the_cache(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^file-0 has .* GiB, more than the whole cache of .*raise data.cache.gibiby"):
        add(open_cache(tmp_path, files=0.5), corpus, "file-0")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(
        DataError, match=rf"the cache {tmp_path}/cache cannot be written: .*set data.cache.directory to"
    ):
        open_cache(tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", folder]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs the right to mount")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_explained(corpus: Corpus, small_disk: Path) -> None:
    cache = open_cache(small_disk)
    add(cache, corpus, "file-0")
    message = rf"the cache {small_disk}/cache cannot be written: No space left on device; free space, lower data.cache"
    with pytest.raises(DataError, match=message):
        add(cache, corpus, "file-1")
    assert names_in(small_disk / "cache") == {corpus.files["file-0"].sha256}
