"""A bounded folder of fetched files that the processes of a machine share and that survives their deaths."""

import errno
import fcntl
import hashlib
import os
import re
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from data.errors import DataError
from data.files import fsync_path
from data.streaming.corpus_files import FileIdentity
from data.streaming.transfer import TransferError

PARTIAL_SUFFIX = ".part"
LOCK_NAME = "lock"
# Whatever is called otherwise is not the cache's, and is neither counted nor removed.
OWN_NAME = re.compile(rf"[0-9a-f]{{64}}({re.escape(PARTIAL_SUFFIX)})?")
GIBIBYTE = 2**30
# From the moment when a path is given out, its reader has this long to open the file.
GRACE_SECONDS = 10.0
POLL_SECONDS = 0.1
FULL = (errno.ENOSPC, errno.EDQUOT)

Store = Callable[[Iterator[bytes]], None]


class _Entry(NamedTuple):
    path: Path
    bytes: int
    used: float


class ShardCache:
    """Files by checksum, fetched once for all; safe to use from several threads and processes.

    A file is written under a partial name, which its writer holds locked, and gets its own name when it is complete
    and verified. The lock of a killed writer vanishes with it; what it left is removed or written anew. Those used
    longest ago make room; whoever has one open still reads it.
    """

    def __init__(self, directory: Path, gibibytes: float, grace_seconds: float = GRACE_SECONDS) -> None:
        """Opens the folder, and makes it if it is not there.

        Args:
            directory: The folder, for this alone.
            gibibytes: Largest size of all its files together.
            grace_seconds: How long after its last use a file is not removed.

        Raises:
            DataError: It cannot be written, or knows no locks.
        """
        self._directory = directory
        self._limit = int(gibibytes * GIBIBYTE)
        self._grace_seconds = grace_seconds
        with self._explained():
            directory.mkdir(parents=True, exist_ok=True)
            with self._locked():
                pass

    def find(self, file: FileIdentity) -> Path | None:
        """The copy of a file, if there is one; counts as its use.

        Raises:
            DataError: It belongs to somebody else.
        """
        path = self._path(file)
        with self._explained(), suppress(FileNotFoundError):
            # In this order: a use keeps the file from being removed from here on.
            os.utime(path)
            if path.stat().st_size == file.bytes:
                return path
        return None

    def add(self, file: FileIdentity, fetch: Callable[[Store], None]) -> Path:
        """Gives the copy of a file; fetches it, or waits until another process has, if there is none.

        Args:
            file: The file.
            fetch: Calls its argument with the chunks of the content, again after a broken transfer.

        Raises:
            DataError: The file is larger than the cache, the disk is full or fails, or `fetch` raised it.
        """
        if file.bytes > self._limit:
            raise DataError(
                f"{file.name} has {file.bytes / GIBIBYTE:.3g} GiB, more than the whole cache of "
                f"{self._limit / GIBIBYTE:.3g} GiB; raise data.cache.gibibytes"
            )
        while (path := self.find(file)) is None:
            with self._explained(), self._partial(file, wait=True) as descriptor:
                if descriptor is not None:
                    self._wait_for_room(descriptor, file)
                    self._fetch(descriptor, file, fetch)
        return path

    def add_ahead(self, file: FileIdentity, fetch: Callable[[Store], None], keep: Collection[str]) -> bool:
        """Fetches a file that will be needed, unless another process does so now.

        Args:
            file: The file.
            fetch: As for `add`.
            keep: Checksums of files that must not be removed for it.

        Returns:
            Whether there was room.

        Raises:
            DataError: As for `add`.
        """
        if self.find(file) is not None:
            return True
        with self._explained(), self._partial(file, wait=False) as descriptor:
            if descriptor is not None:
                if not self._make_room(descriptor, file, keep):
                    return False
                self._fetch(descriptor, file, fetch)
        return True

    def _path(self, file: FileIdentity) -> Path:
        return self._directory / file.sha256

    def _partial_path(self, file: FileIdentity) -> Path:
        return self._directory / (file.sha256 + PARTIAL_SUFFIX)

    @contextmanager
    def _partial(self, file: FileIdentity, *, wait: bool) -> Iterator[int | None]:
        """Opens and locks the partial file of a file; None if the file is there now, or another process fetches it."""
        path = self._partial_path(file)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if not _lock(descriptor, wait):
                yield None
            elif not _is_same_file(path, descriptor):
                yield None  # Its earlier owner has completed or removed it.
            else:
                try:
                    yield descriptor
                finally:
                    if _is_same_file(path, descriptor):
                        path.unlink()
        finally:
            _unlock_and_close(descriptor)

    def _wait_for_room(self, descriptor: int, file: FileIdentity) -> None:
        told = False
        while not self._make_room(descriptor, file, keep=()):
            if not told:
                print(
                    f"the cache {self._directory} of {self._limit / GIBIBYTE:.3g} GiB is full of files in use: waiting "
                    f"for room for {file.name}; data.cache.gibibytes is small for what is read here",
                    file=sys.stderr,
                    flush=True,
                )
                told = True
            time.sleep(POLL_SECONDS)

    def _make_room(self, descriptor: int, file: FileIdentity, keep: Collection[str]) -> bool:
        """Removes what was used longest ago until the file fits, and takes its space; or does nothing."""
        with self._locked():
            entries = list(self._entries())
            excess = sum(entry.bytes for entry in entries) + file.bytes - self._limit
            removed = []
            for entry in sorted(entries, key=lambda entry: entry.used):
                if excess <= 0:
                    break
                if self._can_go(entry, keep):
                    removed.append(entry)
                    excess -= entry.bytes
            if excess > 0:
                return False
            for entry in removed:
                entry.path.unlink(missing_ok=True)
            os.posix_fallocate(descriptor, 0, file.bytes)
            return True

    def _entries(self) -> Iterator[_Entry]:
        for path in self._directory.iterdir():
            if not OWN_NAME.fullmatch(path.name) or not path.is_file() or _is_abandoned(path):
                continue
            with suppress(FileNotFoundError):
                status = path.stat()
                yield _Entry(path, status.st_size, status.st_mtime)

    def _can_go(self, entry: _Entry, keep: Collection[str]) -> bool:
        if entry.path.suffix == PARTIAL_SUFFIX or entry.path.name in keep:
            return False
        # Distance, because a clock may have been set back.
        return abs(time.time() - entry.used) >= self._grace_seconds

    def _fetch(self, descriptor: int, file: FileIdentity, fetch: Callable[[Store], None]) -> None:
        fetch(lambda chunks: _store(descriptor, file, chunks))
        os.fsync(descriptor)
        with self._locked():
            os.replace(self._partial_path(file), self._path(file))
        fsync_path(self._directory)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keeps others from counting and changing what is there; held for moments only."""
        descriptor = os.open(self._directory / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            _unlock_and_close(descriptor)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in FULL:
                fix = "free space, lower data.cache.gibibytes, or set data.cache.directory to another disk"
            else:
                fix = "set data.cache.directory to a folder on a local disk that you may write"
            raise DataError(f"the cache {self._directory} cannot be written: {error.strerror}; {fix}") from None


def _store(descriptor: int, file: FileIdentity, chunks: Iterator[bytes]) -> None:
    """Writes and verifies the content of a file; raises `TransferError` if it is not what it should be."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    digest, size = hashlib.sha256(), 0
    for chunk in chunks:
        size += len(chunk)
        if size > file.bytes:
            raise TransferError(f"more than its {file.bytes} bytes came")
        digest.update(chunk)
        view = memoryview(chunk)
        while view:
            view = view[os.write(descriptor, view) :]
    if size < file.bytes:
        raise TransferError(f"{size} of {file.bytes} bytes came")
    if digest.hexdigest() != file.sha256:
        raise TransferError(f"the content has checksum {digest.hexdigest()}, the manifest says {file.sha256}")


def _lock(descriptor: int, wait: bool) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _unlock_and_close(descriptor: int) -> None:
    # Closing alone would not unlock as long as a forked child has the descriptor too.
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _is_same_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _is_abandoned(path: Path) -> bool:
    """Removes a partial file that nobody writes; says whether it was one."""
    if path.suffix != PARTIAL_SUFFIX:
        return False
    with suppress(FileNotFoundError):
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            if not _lock(descriptor, wait=False) or not _is_same_file(path, descriptor):
                return False
            path.unlink()
        finally:
            _unlock_and_close(descriptor)
    return True
