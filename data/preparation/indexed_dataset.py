"""Reads Megatron's indexed datasets: an index PREFIX.idx, and the tokens in PREFIX.bin or in numbered parts of it.

Own code rather than Megatron-core's reader, which cannot read parts, ends the process with a memory fault when an array
outlives its dataset, and takes seconds to import in each worker.
"""

import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
# Magic, version, code of the token type, number of sequences, number of document boundaries.
HEADER = struct.Struct("<9sQBQQ")
TOKEN_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
FLOAT_CODES = (6, 7)
CHECKED_AT_ONCE = 2**20
FETCH_AGAIN = "fetch or make it again"


class IndexedDataset:
    """Documents of tokens by number; memory is bounded, because the index stays on disk.

    Attributes:
        prefix: Path without .idx and .bin.
        paths: All its files, the index first.
        documents: Number of documents.
        tokens: Number of tokens of all documents.
    """

    def __init__(self, prefix: Path) -> None:
        """Opens a dataset and compares the sizes of its files.

        Args:
            prefix: Path without .idx and .bin; with one of them is fine, too.

        Raises:
            DataError: A file is missing, is no indexed dataset, holds no tokens, or has another size than it should.
        """
        if prefix.suffix in (".idx", ".bin"):
            prefix = prefix.with_suffix("")
        self.prefix = prefix
        index = Path(f"{prefix}.idx")
        if not index.is_file():
            raise DataError(f"{index} does not exist; give the path of an indexed dataset without .idx and .bin")
        self._token_type, sequences, boundaries = _read_header(index)
        self._lengths, self._pointers, self._boundaries = _map_index(index, sequences, boundaries)
        self.documents = boundaries - 1
        if self._boundaries[0] != 0 or self._boundaries[-1] != sequences:
            raise DataError(f"{index}: its documents do not span its {sequences:,} sequences; {FETCH_AGAIN}")
        last = int(self._pointers[-1]) + int(self._lengths[-1]) * self._token_type.itemsize if sequences else 0
        self.tokens = last // self._token_type.itemsize
        parts = _find_parts(prefix)
        self.paths = (index, *parts)
        sizes = [path.stat().st_size for path in parts]
        if sum(sizes) != last:
            named = parts[0] if len(parts) == 1 else f"the {len(parts)} parts of {prefix}"
            raise DataError(f"{named}: {sum(sizes):,} bytes, but {index} speaks of {last:,}; {FETCH_AGAIN}")
        self._parts = parts
        self._part_ends = np.cumsum(sizes)

    def check(self) -> None:
        """Reads the whole index and checks that sequences lie end to end and documents in order.

        Raises:
            DataError: They do not.
        """
        size, index = self._token_type.itemsize, self.paths[0]
        end = 0
        for start in range(0, len(self._lengths), CHECKED_AT_ONCE):
            lengths = self._lengths[start : start + CHECKED_AT_ONCE].astype(np.int64) * size
            expected = end + np.cumsum(lengths) - lengths
            wrong = (self._pointers[start : start + CHECKED_AT_ONCE] != expected) | (lengths < 0)
            if wrong.any():
                raise DataError(
                    f"{index}: sequence {start + int(wrong.argmax()):,} does not begin where the one before it ends; "
                    f"{FETCH_AGAIN}"
                )
            end = int(expected[-1] + lengths[-1])
        for start in range(0, self.documents, CHECKED_AT_ONCE):
            wrong = np.diff(self._boundaries[start : start + CHECKED_AT_ONCE + 1]) < 0
            if wrong.any():
                raise DataError(
                    f"{index}: document {start + int(wrong.argmax()):,} ends before it begins; {FETCH_AGAIN}"
                )

    def offsets(self, first: int, last: int) -> NDArray[np.int64]:
        """Says where documents begin.

        Args:
            first: First document.
            last: One past the last document.

        Returns:
            [last - first + 1] first token of each document, and one past the last token of the last.
        """
        sequences = self._boundaries[first : last + 1]
        inside = sequences < len(self._pointers)
        offsets = np.full(len(sequences), self.tokens, dtype=np.int64)
        offsets[inside] = self._pointers[sequences[inside]] // self._token_type.itemsize
        return offsets

    def read(self, start: int, stop: int) -> NDArray[np.integer]:
        """Reads tokens [start, stop) of all documents laid end to end.

        Args:
            start: First token.
            stop: One past the last token.

        Returns:
            [stop - start] token ids, as stored.

        Raises:
            DataError: A file cannot be read, or has become shorter.
        """
        tokens = np.empty(stop - start, dtype=self._token_type)
        view = tokens.view(np.uint8).data
        position = start * self._token_type.itemsize
        while len(view):
            # A token may begin in one part and end in the next.
            part = int(np.searchsorted(self._part_ends, position, side="right"))
            begin = int(self._part_ends[part - 1]) if part else 0
            wanted = min(len(view), int(self._part_ends[part]) - position)
            _read_into(self._parts[part], view[:wanted], position - begin)
            view, position = view[wanted:], position + wanted
        return tokens


def _read_header(index: Path) -> tuple[np.dtype[np.integer], int, int]:
    with open(index, "rb") as file:
        header = file.read(HEADER.size)
    if not header.startswith(MAGIC) or len(header) < HEADER.size:
        raise DataError(f"{index} is no index of a Megatron dataset; give the path of one without .idx and .bin")
    _, version, code, sequences, boundaries = HEADER.unpack(header)
    if version != VERSION:
        raise DataError(f"{index} has version {version}, only {VERSION} is known; make it with a current Megatron")
    if code in FLOAT_CODES:
        raise DataError(f"{index} holds floating-point numbers, not tokens; give a dataset of token ids")
    if code not in TOKEN_TYPES:
        raise DataError(f"{index} names an unknown type of tokens ({code}); {FETCH_AGAIN}")
    return np.dtype(TOKEN_TYPES[code]), sequences, boundaries


def _map_index(
    index: Path, sequences: int, boundaries: int
) -> tuple[NDArray[np.integer], NDArray[np.integer], NDArray[np.integer]]:
    size, expected = index.stat().st_size, HEADER.size + 12 * sequences + 8 * boundaries
    if size != expected or boundaries == 0:
        raise DataError(
            f"{index} has {size:,} bytes, but should have {expected:,} for {sequences:,} sequences and {boundaries:,} "
            f"document boundaries; {FETCH_AGAIN}"
        )

    def array(kind: str, count: int, offset: int) -> NDArray[np.integer]:
        if count == 0:  # An empty array cannot be mapped.
            return np.empty(0, dtype=kind)
        return np.memmap(index, dtype=kind, mode="r", offset=offset, shape=(count,))

    pointers_at = HEADER.size + 4 * sequences
    return (
        array("<i4", sequences, HEADER.size),
        array("<i8", sequences, pointers_at),
        array("<i8", boundaries, pointers_at + 8 * sequences),
    )


def _find_parts(prefix: Path) -> tuple[Path, ...]:
    whole = Path(f"{prefix}.bin")
    if whole.is_file():
        return (whole,)
    found = dict(_numbered_parts(prefix))
    if not found:
        raise DataError(f"{whole} does not exist, nor do parts of it ({prefix}-00000-of-00002.bin); fetch it")
    count = max(total for _, total in found)
    parts = tuple(Path(f"{prefix}-{number:05d}-of-{count:05d}.bin") for number in range(count))
    missing = [path for path in parts if not path.is_file()]
    if missing or len(found) != count:
        other = missing[0] if missing else next(path for path in found.values() if path not in parts)
        state = "is missing" if missing else f"does not belong to the {count} parts"
        raise DataError(f"{other} {state}: {len(found)} of {count} parts were found; fetch the dataset again")
    return parts


def _numbered_parts(prefix: Path) -> Iterator[tuple[tuple[int, int], Path]]:
    pattern = re.compile(re.escape(prefix.name) + r"-(\d{5})-of-(\d{5})\.bin")
    for path in prefix.parent.iterdir():
        if match := pattern.fullmatch(path.name):
            yield (int(match[1]), int(match[2])), path


def _read_into(path: Path, view: memoryview, offset: int) -> None:
    try:
        with open(path, "rb", buffering=0) as file:
            while len(view):
                count = os.preadv(file.fileno(), [view], offset)
                if count == 0:
                    raise DataError(f"{path} ends at byte {offset:,}; it has become shorter: {FETCH_AGAIN}")
                view, offset = view[count:], offset + count
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); {FETCH_AGAIN}") from None
