"""The files of a prepared corpus, wherever they lie."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple
from urllib.request import url2pathname

from data.config import CacheConfig, is_remote
from data.errors import DataError, MissingFileError
from data.locations import split_url
from data.manifest import ShardRecord
from data.shards import check_size


class FileIdentity(NamedTuple):
    """A file that never changes.

    Attributes:
        name: Path inside the corpus, such as train/shard-00000.tar.
        bytes: Size.
        sha256: Checksum.
    """

    name: str
    bytes: int
    sha256: str


def tar_of(split: str, record: ShardRecord) -> FileIdentity:
    """The tar of a shard."""
    return FileIdentity(f"{split}/{record.file}", record.bytes, record.sha256)


def lengths_of(split: str, record: ShardRecord) -> FileIdentity:
    """The sidecar of a shard with its document lengths."""
    return FileIdentity(f"{split}/{record.lengths_file}", record.lengths_bytes, record.lengths_sha256)


class CorpusFiles(ABC):
    """Gives local paths of a corpus' files; safe to use from several threads.

    Attributes:
        location: Where the corpus lies, as configured; for messages.
        fetches: Whether files lie elsewhere and are fetched before they are read.
        table_folder: Where tables about the corpus may be kept beside it; None if it cannot be written.
    """

    location: str
    fetches: bool
    table_folder: Path | None

    @abstractmethod
    def metadata(self, name: str) -> Path:
        """A small file without a known checksum, such as train/manifest.json.

        Raises:
            MissingFileError: There is no such file, or that cannot be told from a failure.
            DataError: It cannot be fetched.
        """

    @abstractmethod
    def optional_metadata(self, name: str) -> Path | None:
        """As `metadata`, but None instead of `MissingFileError`; after one attempt, if a failure may mean either."""

    @abstractmethod
    def path(self, file: FileIdentity) -> Path:
        """A shard's file; of the right size, and if it was fetched, of the right checksum. To be opened at once.

        Raises:
            DataError: It is missing, has another size, or cannot be fetched.
        """

    @abstractmethod
    def prefetch(self, files: Iterable[FileIdentity]) -> None:
        """Starts to fetch files that will be needed, in that order; returns at once. Replaces earlier wishes."""

    @abstractmethod
    def check_sizes(self, files: Iterable[FileIdentity]) -> None:
        """Checks that files are there with their size, where that costs no transfer.

        Raises:
            DataError: One is missing or has another size.
        """


class LocalFiles(CorpusFiles):
    """A corpus in a directory of this machine or of a shared file system."""

    def __init__(self, root: Path) -> None:
        """Opens the directory.

        Args:
            root: Directory made by a preparation.

        Raises:
            DataError: It does not exist.
        """
        if not root.is_dir():
            raise DataError(f"data.path {root} does not exist; make it with tools/prepare_data.py --output")
        self.location = str(root)
        self.fetches = False
        self.table_folder = root / "counts"
        self._root = root

    def metadata(self, name: str) -> Path:
        """A file of the directory."""
        path = self._root / name
        if not path.is_file():
            raise MissingFileError(f"{path} does not exist; prepare the data again with tools/prepare_data.py")
        return path

    def optional_metadata(self, name: str) -> Path | None:
        """A file of the directory, if it is there."""
        path = self._root / name
        return path if path.is_file() else None

    def path(self, file: FileIdentity) -> Path:
        """A file of the directory."""
        self.check_sizes([file])
        return self._root / file.name

    def prefetch(self, files: Iterable[FileIdentity]) -> None:
        """Nothing to do."""

    def check_sizes(self, files: Iterable[FileIdentity]) -> None:
        """Compares sizes without reading."""
        for file in files:
            check_size(self._root / file.name, file.bytes)


def open_corpus(location: str, cache: CacheConfig) -> CorpusFiles:
    """Opens a corpus by its location.

    Args:
        location: A directory, or a URL.
        cache: How copies of what lies elsewhere are kept.

    Returns:
        Its files.

    Raises:
        DataError: The directory does not exist, nothing is known to fetch such a URL with, or it is malformed.
    """
    if location.startswith("file://"):
        return LocalFiles(Path(url2pathname(split_url(location).path)))
    if not is_remote(location):
        return LocalFiles(Path(location))
    # Imported here because it is a kind of corpus files itself.
    from data.streaming.remote_files import RemoteFiles

    return RemoteFiles(location, cache)
