"""Intermediate shards: documents as they were read, with what a second phase needs to know about each.

An intermediate shard is a shard whose documents may stand in another order than in the input, with two sidecars:
`shard-N.documents.npy` in the order of the shard, and `shard-N.hashes.npy` sorted by hash.
"""

import os
from array import array
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.manifest import ShardRecord
from data.preparation.split_writer import StoredDocument
from data.shard_writer import ShardWriter, npy_bytes

# Larger than shards, so that few files are open and long runs are read; one of each split is held in memory.
MAXIMUM_TOKENS = 2**27
# Completing a shard takes some 200 bytes a document.
MAXIMUM_DOCUMENTS = 2**21
# offset: first token in the shard; size: bytes of the text in UTF-8.
DOCUMENTS = np.dtype([("key", "<u8"), ("offset", "<u8"), ("length", "<u4"), ("size", "<u4")])
# rank: place in the input within the shard; index: place in the shard.
HASHES = np.dtype([("high", "<u8"), ("low", "<u8"), ("rank", "<u4"), ("index", "<u4")])


def intermediate_tokens(shard_tokens: int) -> int:
    """Size of an intermediate shard.

    Args:
        shard_tokens: Size of the shards that are made of it.

    Returns:
        Tokens.
    """
    return max(min(4 * shard_tokens, MAXIMUM_TOKENS), 1)


def random_keys(seed: int, stream: tuple[int, int], count: int) -> NDArray[np.uint64]:
    """Draws the sort keys of a shuffle; raw output of the generator, which no version of NumPy changes.

    Args:
        seed: Seed of the shuffle.
        stream: Numbers of the split and of the shard.
        count: Number of documents.

    Returns:
        [count] keys, uniform over 64 bits.
    """
    return np.random.Philox(np.random.SeedSequence([seed, *stream])).random_raw(count)


class IntermediateWriter:
    """Holds the documents of one shard, and writes them in the order of random keys or of the input."""

    def __init__(
        self,
        directory: Path,
        index: int,
        dtype: str,
        vocab_size: int,
        seed: int | None,
        split_number: int,
        maximum_tokens: int,
    ) -> None:
        """Opens the shard.

        Args:
            directory: The split's directory.
            index: Number of the shard.
            dtype: `uint16` or `uint32`.
            vocab_size: One more than the largest token id.
            seed: Seed of the shuffle; none: the order of the input.
            split_number: Number of the split.
            maximum_tokens: The shard is full with the document that reaches this number.
        """
        self._directory = directory
        self._index = index
        self._writer = ShardWriter(directory, index, dtype, vocab_size)
        self._stream = (split_number, index)
        self._seed = seed
        self._maximum_tokens = maximum_tokens
        self._dtype = np.dtype(dtype)
        self._clear()

    def _clear(self) -> None:
        # Not an object for each document: there may be millions of short ones.
        self._tokens = bytearray()
        self._lengths = array("I")
        self._sizes = array("I")
        self._hashes = bytearray()

    @property
    def is_full(self) -> bool:
        """Whether the last document has reached the number of tokens or of documents."""
        tokens = len(self._tokens) // self._dtype.itemsize
        return tokens >= self._maximum_tokens or len(self._lengths) >= MAXIMUM_DOCUMENTS

    def add(self, document: StoredDocument) -> None:
        """Appends a document.

        Args:
            document: What is kept until the shard is complete.
        """
        self._tokens += document.tokens.astype(self._dtype, copy=False).data
        self._lengths.append(len(document.tokens))
        self._sizes.append(document.size)
        self._hashes += document.hashed.tobytes()

    def finish(self) -> ShardRecord:
        """Writes the shard.

        Returns:
            Its record.
        """
        count = len(self._lengths)
        keys = np.zeros(count, np.uint64) if self._seed is None else random_keys(self._seed, self._stream, count)
        order = np.argsort(keys, kind="stable")
        lengths, tokens = np.array(self._lengths, np.uint32), np.frombuffer(self._tokens, self._dtype)
        rows = np.zeros(count, DOCUMENTS)
        rows["key"], rows["length"] = keys[order], lengths[order]
        rows["size"] = np.array(self._sizes, np.uint32)[order]
        rows["offset"][1:] = np.cumsum(rows["length"][:-1], dtype=np.uint64)
        _write(documents_path(self._directory, self._index), rows)
        if self._hashes:
            _write(hashes_path(self._directory, self._index), self._sorted_hashes(order))
        ends = np.cumsum(lengths, dtype=np.int64)
        for rank in order:
            self._writer.add(tokens[ends[rank] - lengths[rank] : ends[rank]])
        self._clear()
        return self._writer.finish()

    def _sorted_hashes(self, order: NDArray[np.int64]) -> NDArray[np.void]:
        hashes = np.frombuffer(self._hashes, np.uint64).reshape(-1, 2)[order]
        rows = np.zeros(len(order), HASHES)
        rows["high"], rows["low"] = hashes[:, 0], hashes[:, 1]
        rows["rank"], rows["index"] = order, np.arange(len(order))
        return rows[np.lexsort((rows["rank"], rows["low"], rows["high"]))]

    def abandon(self) -> None:
        """Deletes the unfinished shard."""
        self._clear()
        self._writer.abandon()


def documents_path(directory: Path, index: int) -> Path:
    """Names the sidecar with one row of type DOCUMENTS a document."""
    return directory / f"shard-{index:05d}.documents.npy"


def hashes_path(directory: Path, index: int) -> Path:
    """Names the sidecar with one row of type HASHES a document."""
    return directory / f"shard-{index:05d}.hashes.npy"


def _write(path: Path, rows: NDArray[np.void]) -> None:
    with open(path, "wb") as file:
        file.write(npy_bytes(rows))
        file.flush()
        os.fsync(file.fileno())
