"""Reads and checks shards: plain WebDataset tars of tokenized documents."""

import io
import os
import weakref
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.manifest import Manifest, ShardRecord

PREPARE_AGAIN = "prepare the data again with tools/prepare_data.py, or copy it again from its source"


def npy_header(shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> bytes:
    """The bytes that stand before the values of an array in NumPy's .npy format.

    Args:
        shape: Shape of the array.
        dtype: Type of its values.

    Returns:
        Magic number, version and header.
    """
    buffer = io.BytesIO()
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


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
        for sample in {0, len(record.sample_offsets) - 1}:
            self._check_header(sample, record)

    def _check_header(self, sample: int, record: ShardRecord) -> None:
        """Finds a manifest of another shard, a lost member or another dtype before wrong tokens are read."""
        expected = npy_header((record.sample_tokens[sample],), self._dtype)
        found = np.empty(len(expected), dtype=np.uint8)
        begin = record.sample_offsets[sample] - len(expected)
        self._read_into(found, begin)
        if found.tobytes() != expected:
            raise DataError(
                f"shard {self._path} does not hold sample {sample} as {record.sample_tokens[sample]} tokens of "
                f"{self._dtype.name} at byte {begin}, as its manifest says; {PREPARE_AGAIN}"
            )

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
        sample = int(self._ends.searchsorted(start, side="right"))
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
    return parse_document_lengths(directory / record.lengths_file, record)


def parse_document_lengths(path: Path, record: ShardRecord) -> NDArray[np.int64]:
    """Reads the sidecar of a shard, whatever its file is called.

    Args:
        path: The sidecar.
        record: The shard's entry in the manifest.

    Returns:
        [documents] number of tokens of each document.

    Raises:
        DataError: The sidecar is missing or contradicts the manifest.
    """
    dtype = np.dtype("<u4")
    # Not np.load: it parses the header with Python's compiler, which fails now and then in threads of Python 3.11
    # (CPython issue 106905), and the header is known.
    header = npy_header((record.documents,), dtype)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"document lengths {path} cannot be read ({error.strerror}); {PREPARE_AGAIN}") from None
    if not content.startswith(header) or len(content) != len(header) + record.documents * dtype.itemsize:
        raise DataError(
            f"document lengths {path} are not those of {record.documents} documents, as the manifest says; "
            f"{PREPARE_AGAIN}"
        )
    lengths = np.frombuffer(content, dtype, offset=len(header)).astype(np.int64)
    if int(lengths.sum()) != record.tokens:
        raise DataError(
            f"document lengths {path} add up to {int(lengths.sum())} tokens, the manifest says {record.tokens}; "
            f"{PREPARE_AGAIN}"
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
        check_size(directory / record.file, record.bytes)
        check_size(directory / record.lengths_file, record.lengths_bytes)


def check_size(path: Path, expected: int) -> None:
    """Compares the size of a file that a manifest names.

    Args:
        path: The file.
        expected: Its size in the manifest.

    Raises:
        DataError: It is missing or has another size.
    """
    try:
        actual = path.stat().st_size
    except OSError:
        raise DataError(f"{path} is named in the manifest but missing; {PREPARE_AGAIN}") from None
    if actual != expected:
        raise DataError(f"{path} has {actual} bytes, the manifest says {expected}; {PREPARE_AGAIN}")
