"""Intermediate shards: documents as they were read, with what a second phase needs to know about each.

An intermediate shard is a shard whose documents may stand in another order than in the input, with two sidecars:
`shard-N.documents.npy` in the order of the shard, and `shard-N.hashes.npy` sorted by hash.
"""

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.manifest import ShardRecord
from data.preparation.split_writer import StoredDocument
from data.shard_writer import ShardWriter, npy_bytes

# Larger than shards, so that few files are open and long runs are read; one of each split is held in memory.
MAXIMUM_TOKENS = 2**27
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
        self, directory: Path, index: int, dtype: str, vocab_size: int, seed: int | None, split_number: int
    ) -> None:
        """Opens the shard.

        Args:
            directory: The split's directory.
            index: Number of the shard.
            dtype: `uint16` or `uint32`.
            vocab_size: One more than the largest token id.
            seed: Seed of the shuffle; none: the order of the input.
            split_number: Number of the split.
        """
        self.tokens = 0
        self._directory = directory
        self._index = index
        self._writer = ShardWriter(directory, index, dtype, vocab_size)
        self._stream = (split_number, index)
        self._seed = seed
        self._documents: list[StoredDocument] = []

    def add(self, document: StoredDocument) -> None:
        """Appends a document.

        Args:
            document: What is kept until the shard is complete.
        """
        # A view would keep all tokens of its chunk alive.
        self._documents.append(document._replace(tokens=document.tokens.copy()))
        self.tokens += len(document.tokens)

    def finish(self) -> ShardRecord:
        """Writes the shard.

        Returns:
            Its record.
        """
        count = len(self._documents)
        keys = np.zeros(count, np.uint64) if self._seed is None else random_keys(self._seed, self._stream, count)
        order = np.argsort(keys, kind="stable")
        rows = np.zeros(count, DOCUMENTS)
        rows["key"] = keys[order]
        for index, rank in enumerate(order):
            document = self._documents[rank]
            self._writer.add(document.tokens)
            rows["length"][index], rows["size"][index] = len(document.tokens), document.size
        rows["offset"][1:] = np.cumsum(rows["length"][:-1], dtype=np.uint64)
        _write(documents_path(self._directory, self._index), rows)
        if len(self._documents[0].hashed):
            _write(hashes_path(self._directory, self._index), self._sorted_hashes(order))
        self._documents = []
        return self._writer.finish()

    def _sorted_hashes(self, order: NDArray[np.int64]) -> NDArray[np.void]:
        hashes = np.stack([document.hashed for document in self._documents])[order]
        rows = np.zeros(len(order), HASHES)
        rows["high"], rows["low"] = hashes[:, 0], hashes[:, 1]
        rows["rank"], rows["index"] = order, np.arange(len(order))
        return rows[np.lexsort((rows["rank"], rows["low"], rows["high"]))]

    def abandon(self) -> None:
        """Deletes the unfinished shard."""
        self._documents = []
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
