"""Finds documents with equal texts among intermediate shards, in bounded memory."""

import bisect
import functools
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.files import fsync_path
from data.preparation.progress import Progress
from data.preparation.workers import WorkerPool

# Documents whose hashes one worker sorts at once, about 200 MB.
PARTITION_DOCUMENTS = 2**22


@dataclass(frozen=True)
class HashFile:
    """Sorted hashes of one intermediate shard.

    Attributes:
        path: The file, of type `data.preparation.intermediate.HASHES`.
        documents: Number of its documents.
    """

    path: Path
    documents: int


def find_kept(
    files: Sequence[HashFile],
    kept_path: Path,
    workers: int,
    partition_documents: int = PARTITION_DOCUMENTS,
    shown: bool = True,
) -> None:
    """Writes, for each document of all shards laid end to end, whether it is the first with its text.

    Args:
        files: The hashes of all shards; of equal documents the one in the earliest shard stays, and within a shard
            the first of the input.
        kept_path: The .npy of [documents] booleans to make; it appears when it is complete.
        workers: Number of processes, at least 1.
        partition_documents: About as many documents are compared at once.
        shown: Whether to show progress.
    """
    total = sum(file.documents for file in files)
    partitions = max(-(-total // partition_documents), 1)
    temporary = kept_path.with_name(f".{kept_path.name}.tmp")
    # On the disk: a byte for each of hundreds of millions of documents, written in random order.
    kept = np.lib.format.open_memmap(temporary, "w+", bool, (total,))
    kept[:] = True
    pool: WorkerPool[tuple[int, int], NDArray[np.int64]] = WorkerPool(
        functools.partial(_finder, tuple(files)), min(workers, partitions)
    )
    edges = [(number << 64) // partitions for number in range(partitions + 1)]
    with pool, Progress("finding duplicates", "parts", partitions, shown=shown) as progress:
        for removed in pool.map(itertools.pairwise(edges), ordered=False):
            kept[removed] = False
            progress.update(1)
    kept.flush()
    fsync_path(temporary)
    os.replace(temporary, kept_path)
    fsync_path(kept_path.parent)


def _finder(files: tuple[HashFile, ...]) -> Callable[[tuple[int, int]], NDArray[np.int64]]:
    return lambda edges: _duplicates_between(files, *edges)


def _duplicates_between(files: tuple[HashFile, ...], begin: int, end: int) -> NDArray[np.int64]:
    """Compares the documents whose hashes begin with numbers in [begin, end); gives the numbers of later ones."""
    highs, lows, ranks, numbers = [], [], [], []
    base = 0
    for file in files:
        rows = np.load(file.path, mmap_mode="r")
        start, stop = (bisect.bisect_left(rows, edge, key=lambda row: int(row["high"])) for edge in (begin, end))
        part = np.array(rows[start:stop])
        highs.append(part["high"])
        lows.append(part["low"])
        ranks.append(part["rank"].astype(np.int64) + base)
        numbers.append(part["index"].astype(np.int64) + base)
        base += file.documents
    high, low, rank, number = (np.concatenate(column) for column in (highs, lows, ranks, numbers))
    order = np.lexsort((rank, low, high))
    high, low = high[order], low[order]
    repeated = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
    return number[order][1:][repeated]
