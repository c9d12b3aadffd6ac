"""Writes shards: plain WebDataset tars of tokenized documents."""

import hashlib
import io
import os
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.files import fsync_path, sha256_of_file
from data.manifest import ShardRecord

TOKENS_MEMBER = "tokens.npy"
LENGTHS_MEMBER = "doc_lengths.npy"
# Documents are grouped into samples of about this many tokens (2 MB as uint16).
SAMPLE_TOKENS = 2**20


class ShardWriter:
    """Writes one shard under a temporary name; `finish` gives it its name once all of it is on disk."""

    def __init__(self, directory: Path, index: int, dtype: str, vocab_size: int | None = None) -> None:
        """Opens the shard.

        Args:
            directory: The split's directory.
            index: Number of the shard in the split.
            dtype: `uint16` or `uint32`.
            vocab_size: One more than the largest token id that may be written; by default all that `dtype` holds.
        """
        self.tokens = 0
        self._directory = directory
        self._index = index
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._vocab_size = vocab_size or int(np.iinfo(self._dtype).max) + 1
        self._temporary = directory / f".{self._name}.tar.tmp"
        self._file = _HashingFile(self._temporary)
        self._tar = tarfile.open(fileobj=self._file, mode="w|", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self._group: list[NDArray[np.unsignedinteger]] = []
        self._group_tokens = 0
        self._lengths: list[int] = []
        self._samples = 0

    @property
    def _name(self) -> str:
        return f"shard-{self._index:05d}"

    def add(self, tokens: NDArray[np.unsignedinteger]) -> None:
        """Appends a document.

        Args:
            tokens: Its token ids, without end of text; at least one.

        Raises:
            DataError: A token id is not in the vocabulary; at the latest when the shard is finished.
        """
        self._group.append(tokens)
        self._group_tokens += len(tokens)
        self._lengths.append(len(tokens))
        self.tokens += len(tokens)
        if self._group_tokens >= SAMPLE_TOKENS:
            self._write_sample()

    def _write_sample(self) -> None:
        lengths = [len(document) for document in self._group]
        tokens = np.concatenate(self._group)
        if (largest := int(tokens.max())) >= self._vocab_size:
            raise DataError(
                f"token id {largest} is outside the vocabulary of {self._vocab_size} that {self._directory} is made "
                "for; use the tokenizer that made these tokens"
            )
        key = f"{self._index:05d}-{self._samples:05d}"
        self._write_member(f"{key}.{LENGTHS_MEMBER}", npy_bytes(np.asarray(lengths, dtype="<u4")))
        self._write_member(f"{key}.{TOKENS_MEMBER}", npy_bytes(tokens.astype(self._dtype)))
        self._samples += 1
        self._group, self._group_tokens = [], 0

    def _write_member(self, name: str, content: bytes) -> None:
        # Time and owner stay zero: equal documents give equal bytes.
        member = tarfile.TarInfo(name)
        member.size = len(content)
        member.mode = 0o444
        self._tar.addfile(member, io.BytesIO(content))

    def finish(self) -> ShardRecord:
        """Completes the shard and its sidecar.

        Returns:
            The shard's entry for the manifest.
        """
        if self._group:
            self._write_sample()
        self._tar.close()
        self._file.sync_and_close()
        lengths_path = self._directory / f"{self._name}.lengths.npy"
        with open(lengths_path, "wb") as file:
            file.write(npy_bytes(np.asarray(self._lengths, dtype="<u4")))
            file.flush()
            os.fsync(file.fileno())
        path = self._directory / f"{self._name}.tar"
        os.replace(self._temporary, path)
        fsync_path(self._directory)
        return _record(path, self._file.sha256.hexdigest(), lengths_path, self._lengths, self._dtype)

    def abandon(self) -> None:
        """Deletes the unfinished shard."""
        # Before its file: a tar stream that is still open writes its buffer when it is collected.
        with suppress(Exception):
            self._tar.close()
        with suppress(OSError):
            self._file.close()
        self._temporary.unlink(missing_ok=True)


class _HashingFile(io.FileIO):
    """A new file that knows the checksum of what was written to it in sequence."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "wb")
        self.sha256 = hashlib.sha256()

    def write(self, content: Any) -> int:
        """Writes all bytes."""
        rest = memoryview(content)
        while rest:
            rest = rest[super().write(rest) :]
        self.sha256.update(content)
        return len(content)

    def sync_and_close(self) -> None:
        """Brings everything to the disk."""
        os.fsync(self.fileno())
        self.close()


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


def _record(
    path: Path, sha256: str, lengths_path: Path, lengths: list[int], dtype: np.dtype[np.generic]
) -> ShardRecord:
    offsets, counts = _index_samples(path, dtype.itemsize)
    return ShardRecord(
        file=path.name,
        documents=len(lengths),
        tokens=sum(lengths),
        bytes=path.stat().st_size,
        sha256=sha256,
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
