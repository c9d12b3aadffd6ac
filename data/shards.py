"""Writes and reads shards: plain WebDataset tars of tokenized documents."""

import io
import os
import tarfile
import weakref
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.files import fsync_path, sha256_of_file
from data.manifest import Manifest, ShardRecord, read_manifest

TOKENS_MEMBER = "tokens.npy"
LENGTHS_MEMBER = "doc_lengths.npy"
# Documents are grouped into samples of about this many tokens (2 MB as uint16).
SAMPLE_TOKENS = 2**20
SPLITS = ("train", "validation")
PREPARE_AGAIN = "prepare the data again with tools/prepare_data.py, or copy it again from its source"


class ShardWriter:
    """Writes one shard under a temporary name; `finish` gives it its name once all of it is on disk."""

    def __init__(self, directory: Path, index: int, dtype: str) -> None:
        """Opens the shard.

        Args:
            directory: The split's directory.
            index: Number of the shard in the split.
            dtype: `uint16` or `uint32`.
        """
        # Imported here because webdataset imports torch, which readers and tokenizer workers do without.
        from webdataset.writer import TarWriter

        self.tokens = 0
        self._directory = directory
        self._index = index
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._temporary = directory / f".{self._name}.tar.tmp"
        self._file = open(self._temporary, "wb")  # noqa: SIM115  closed by finish or abandon
        # Fixed time and owner: equal documents give equal bytes.
        self._tar = TarWriter(self._file, user="", group="", mtime=0, encoder=False)
        self._group: list[NDArray[np.uint32]] = []
        self._group_tokens = 0
        self._lengths: list[int] = []
        self._samples = 0

    @property
    def _name(self) -> str:
        return f"shard-{self._index:05d}"

    def add(self, tokens: NDArray[np.uint32]) -> None:
        """Appends a document.

        Args:
            tokens: Its token ids, without end of text; at least one.
        """
        self._group.append(tokens)
        self._group_tokens += len(tokens)
        self._lengths.append(len(tokens))
        self.tokens += len(tokens)
        if self._group_tokens >= SAMPLE_TOKENS:
            self._write_sample()

    def _write_sample(self) -> None:
        lengths = [len(document) for document in self._group]
        tokens = np.concatenate(self._group).astype(self._dtype)
        self._tar.write(
            {
                "__key__": f"{self._index:05d}-{self._samples:05d}",
                TOKENS_MEMBER: npy_bytes(tokens),
                LENGTHS_MEMBER: npy_bytes(np.asarray(lengths, dtype="<u4")),
            }
        )
        self._samples += 1
        self._group, self._group_tokens = [], 0

    def finish(self) -> ShardRecord:
        """Completes the shard and its sidecar.

        Returns:
            The shard's entry for the manifest.
        """
        if self._group:
            self._write_sample()
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        lengths_path = self._directory / f"{self._name}.lengths.npy"
        with open(lengths_path, "wb") as file:
            file.write(npy_bytes(np.asarray(self._lengths, dtype="<u4")))
            file.flush()
            os.fsync(file.fileno())
        path = self._directory / f"{self._name}.tar"
        os.replace(self._temporary, path)
        fsync_path(self._directory)
        return _record(path, lengths_path, self._lengths, self._dtype)

    def abandon(self) -> None:
        """Deletes the unfinished shard."""
        # Before its file: a tar stream that is still open writes its buffer when it is collected.
        with suppress(Exception):
            self._tar.close()
        self._file.close()
        self._temporary.unlink(missing_ok=True)


def npy_bytes(array: NDArray[np.generic]) -> bytes:
    """Serializes an array in NumPy's .npy format.

    Args:
        array: Any array without objects.

    Returns:
        The bytes of the file.
    """
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _record(path: Path, lengths_path: Path, lengths: list[int], dtype: np.dtype[np.generic]) -> ShardRecord:
    offsets, counts = _index_samples(path, dtype.itemsize)
    return ShardRecord(
        file=path.name,
        documents=len(lengths),
        tokens=sum(lengths),
        bytes=path.stat().st_size,
        sha256=sha256_of_file(path),
        lengths_file=lengths_path.name,
        lengths_bytes=lengths_path.stat().st_size,
        lengths_sha256=sha256_of_file(lengths_path),
        sample_offsets=tuple(offsets),
        sample_tokens=tuple(counts),
    )


def _index_samples(path: Path, item_bytes: int) -> tuple[list[int], list[int]]:
    """Finds, by reading the finished tar, where the raw tokens of each sample lie."""
    offsets, counts = [], []
    with tarfile.open(path, "r:") as tar, open(path, "rb") as file:
        for member in tar:
            if not member.name.endswith(TOKENS_MEMBER):
                continue
            file.seek(member.offset_data)
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            offsets.append(file.tell())
            counts.append((member.offset_data + member.size - file.tell()) // item_bytes)
    return offsets, counts


class ShardReader:
    """Reads tokens of one local shard by position; safe to use from several threads."""

    def __init__(self, path: Path, record: ShardRecord, dtype: str) -> None:
        """Opens the shard.

        Args:
            path: The tar.
            record: Its entry in the manifest.
            dtype: `uint16` or `uint32`.

        Raises:
            DataError: The tar cannot be opened.
        """
        self._path = path
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._offsets = record.sample_offsets
        self._ends = np.cumsum(record.sample_tokens)
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"shard {path} cannot be opened ({error.strerror}); {PREPARE_AGAIN}") from None
        # Closed with the last reference, because another thread may still be reading.
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, start: int, stop: int) -> NDArray[np.unsignedinteger]:
        """Reads tokens [start, stop) of all documents of the shard laid end to end.

        Args:
            start: First token.
            stop: One past the last token.

        Returns:
            [stop - start] token ids, as stored.

        Raises:
            DataError: The file ends too early or cannot be read.
        """
        tokens = np.empty(stop - start, dtype=self._dtype)
        sample = int(np.searchsorted(self._ends, start, side="right"))
        position = start
        while position < stop:
            sample_end = int(self._ends[sample])
            sample_start = int(self._ends[sample - 1]) if sample else 0
            end = min(stop, sample_end)
            offset = self._offsets[sample] + (position - sample_start) * self._dtype.itemsize
            self._read_into(tokens[position - start : end - start], offset)
            position, sample = end, sample + 1
        return tokens

    def _read_into(self, tokens: NDArray[np.unsignedinteger], offset: int) -> None:
        view = tokens.view(np.uint8).data
        while len(view):
            try:
                count = os.preadv(self._descriptor, [view], offset)
            except OSError as error:
                raise DataError(f"shard {self._path} cannot be read ({error.strerror}); {PREPARE_AGAIN}") from None
            if count == 0:
                raise DataError(f"shard {self._path} ends at byte {offset}, before its last token; {PREPARE_AGAIN}")
            view, offset = view[count:], offset + count


def read_document_lengths(directory: Path, record: ShardRecord) -> NDArray[np.int64]:
    """Reads the sidecar of a shard.

    Args:
        directory: The split's directory.
        record: The shard's entry in the manifest.

    Returns:
        [documents] number of tokens of each document.

    Raises:
        DataError: The sidecar is missing or contradicts the manifest.
    """
    path = directory / record.lengths_file
    try:
        lengths: NDArray[np.int64] = np.load(path, allow_pickle=False).astype(np.int64)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"document lengths {path} cannot be read ({error}); {PREPARE_AGAIN}") from None
    if lengths.shape != (record.documents,) or int(lengths.sum()) != record.tokens:
        raise DataError(
            f"document lengths {path} add up to {int(lengths.sum())} tokens in {lengths.size} documents, the manifest "
            f"says {record.tokens} in {record.documents}; {PREPARE_AGAIN}"
        )
    return lengths


def check_sizes(directory: Path, manifest: Manifest) -> None:
    """Compares the size of every file of a split with the manifest, without reading any.

    Args:
        directory: The split's directory.
        manifest: Its manifest.

    Raises:
        DataError: A file is missing or has another size.
    """
    for record in manifest.shards:
        for name, expected in ((record.file, record.bytes), (record.lengths_file, record.lengths_bytes)):
            path = directory / name
            if not path.is_file():
                raise DataError(f"{path} is named in the manifest but missing; {PREPARE_AGAIN}")
            actual = path.stat().st_size
            if actual != expected:
                raise DataError(f"{path} has {actual} bytes, the manifest says {expected}; {PREPARE_AGAIN}")


def verify_shards(directory: Path) -> int:
    """Reads every file of a prepared directory and compares it with its checksum.

    Args:
        directory: The directory made by tools/prepare_data.py.

    Returns:
        Number of shards, all of them intact.

    Raises:
        DataError: A split, a shard, a sidecar or the tokenizer is missing or damaged.
    """
    splits = [split for split in SPLITS if (directory / split).is_dir()]
    if not splits:
        raise DataError(f"{directory} holds neither train/ nor validation/; make them with tools/prepare_data.py")
    shards = 0
    for split in splits:
        manifest = read_manifest(directory / split)
        check_sizes(directory / split, manifest)
        _compare_checksum(directory / manifest.tokenizer_file, manifest.tokenizer_fingerprint)
        for record in manifest.shards:
            _compare_checksum(directory / split / record.file, record.sha256)
            _compare_checksum(directory / split / record.lengths_file, record.lengths_sha256)
            shards += 1
    return shards


def _compare_checksum(path: Path, expected: str) -> None:
    if not path.is_file():
        raise DataError(f"{path} is named in the manifest but missing; {PREPARE_AGAIN}")
    actual = sha256_of_file(path)
    if actual != expected:
        raise DataError(f"{path} has checksum {actual}, the manifest says {expected}; {PREPARE_AGAIN}")
