"""A corpus that lies elsewhere: its files are fetched into a cache on this machine."""

import hashlib
import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from data.config import CacheConfig
from data.errors import DataError, MissingFileError
from data.files import write_atomically
from data.locations import user_cache_folder
from data.streaming.corpus_files import CorpusFiles, FileIdentity
from data.streaming.shard_cache import ShardCache
from data.streaming.transfer import Fetcher

FOLDER_NAME = "block-transformer-cache"


class RemoteFiles(CorpusFiles):
    """A corpus behind a URL or a command."""

    def __init__(self, location: str, config: CacheConfig, *, first_wait_seconds: float = 1.0) -> None:
        """Opens the cache; fetches nothing yet.

        Args:
            location: URL of the corpus, or `pipe:` and a command with {file} in it.
            config: How copies are kept.
            first_wait_seconds: Pause after the first failed attempt to fetch a file; doubles with each.

        Raises:
            DataError: Nothing can fetch from there, or the cache cannot be written.
        """
        self._fetcher = Fetcher(
            location,
            attempts=config.attempts,
            stall_seconds=config.stall_seconds,
            first_wait_seconds=first_wait_seconds,
        )
        self.location = self._fetcher.shown
        self.fetches = True
        self._attempts = config.attempts
        folder = _cache_folder(config)
        self._cache = ShardCache(folder / "shards", config.gibibytes)
        self._metadata_folder = folder / "metadata"
        self.table_folder = folder / "counts"
        self._metadata: dict[str, Path | None] = {}
        self._metadata_lock = threading.Lock()
        self._prefetcher = _Prefetcher(self)

    def metadata(self, name: str) -> Path:
        """Fetches the file, anew in each process, because it may have changed since."""
        with self._metadata_lock:
            path = self._metadata.get(name)
            if path is None:
                path = self._metadata[name] = self._fetch_metadata(name, attempts=self._attempts)
            return path

    def optional_metadata(self, name: str) -> Path | None:
        """As `metadata`, or None."""
        attempts = self._attempts if self._fetcher.tells_missing else 1
        with self._metadata_lock:
            if name not in self._metadata:
                try:
                    self._metadata[name] = self._fetch_metadata(name, attempts)
                except MissingFileError:
                    self._metadata[name] = None
            return self._metadata[name]

    def _fetch_metadata(self, name: str, attempts: int) -> Path:
        content = self._fetcher.fetch(name, b"".join, expected=False, attempts=attempts)
        # By content, so that neither other locations nor later versions of a file change what was given out.
        path = self._metadata_folder / hashlib.sha256(content).hexdigest()[:32] / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content)
        except OSError as error:
            raise DataError(
                f"{path} cannot be written: {error.strerror}; free space, or set data.cache.directory to another disk"
            ) from None
        return path

    def path(self, file: FileIdentity) -> Path:
        """The copy in the cache, fetched if need be."""
        return self._cache.add(file, lambda store: self._fetcher.fetch(file.name, store, expected=True))

    def fetch_ahead(self, file: FileIdentity, keep: set[str]) -> bool:
        """Fetches a file that will be needed, unless another process does.

        Args:
            file: The file.
            keep: Checksums of files that must stay.

        Returns:
            Whether there was room for it.

        Raises:
            DataError: It cannot be fetched.
        """
        return self._cache.add_ahead(file, lambda store: self._fetcher.fetch(file.name, store, expected=True), keep)

    def prefetch(self, files: Iterable[FileIdentity]) -> None:
        """Lets a thread fetch the files one by one."""
        self._prefetcher.wish(list(files))

    def check_sizes(self, files: Iterable[FileIdentity]) -> None:
        """Nothing: sizes are checked as files are fetched."""


class _Prefetcher:
    """One thread that fetches what was wished for last."""

    def __init__(self, files: RemoteFiles) -> None:
        self._files = files
        self._start_anew()

    def _start_anew(self) -> None:
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._wishes: list[FileIdentity] = []
        self._thread: threading.Thread | None = None

    def wish(self, files: list[FileIdentity]) -> None:
        if self._process != os.getpid():
            # Forked: the thread stayed with the parent, and may have held the lock just then.
            self._start_anew()
        with self._changed:
            self._wishes = files
            if self._thread is None and files:
                self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
                self._thread.start()
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wishes)
                wishes = self._wishes
            self._fetch(wishes)
            with self._changed:
                if self._wishes is wishes:
                    self._wishes = []

    def _fetch(self, wishes: list[FileIdentity]) -> None:
        keep = {file.sha256 for file in wishes}
        for file in wishes:
            if self._wishes is not wishes:
                return
            # Whoever needs the file will meet the same error, and report it.
            with suppress(DataError):
                if not self._files.fetch_ahead(file, keep):
                    return


def _cache_folder(config: CacheConfig) -> Path:
    """A folder for the cache alone: the configured directory may hold other things too."""
    if config.directory is not None:
        return config.directory / FOLDER_NAME
    folder = user_cache_folder()
    if folder is None:
        raise DataError("no home directory is known here, so data.cache.directory must be set to a folder for copies")
    return folder
