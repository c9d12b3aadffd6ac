"""Makes shards of intermediate shards: without duplicates, in the order of the input or shuffled.

The shuffle is an external sort by random keys: each intermediate shard is sorted by key, output shard k of K takes from
each the run of documents with keys in [k / K, (k + 1) / K) of the whole range, and merges them.
"""

import bisect
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.manifest import ShardRecord
from data.preparation.intermediate import documents_path
from data.preparation.parallel_shards import build_shards
from data.shard_writer import ShardWriter
from data.shards import ShardReader


@dataclass(frozen=True)
class IntermediateSplit:
    """All intermediate shards of a split.

    Attributes:
        directory: Where they are.
        shards: Their records.
        dtype: `uint16` or `uint32`.
        vocab_size: One more than the largest token id.
        kept_path: The file made by `data.preparation.duplicates.find_kept`; none: all documents stay.
        first_document: Number, in that file, of the split's first document.
    """

    directory: Path
    shards: tuple[ShardRecord, ...]
    dtype: str
    vocab_size: int
    kept_path: Path | None
    first_document: int

    def documents(self, shard: int) -> NDArray[np.void]:
        """Opens the sidecar of a shard: [documents] of type DOCUMENTS, in the order of the shard."""
        rows: NDArray[np.void] = np.load(documents_path(self.directory, shard), mmap_mode="r")
        return rows

    @functools.cached_property
    def _starts(self) -> list[int]:
        return [0, *np.cumsum([record.documents for record in self.shards]).tolist()]

    def kept(self, shard: int, start: int, stop: int) -> NDArray[np.bool_]:
        """Says which of the documents [start, stop) of a shard stay."""
        if self.kept_path is None:
            return np.ones(stop - start, bool)
        first = self.first_document + self._starts[shard]
        return np.array(np.load(self.kept_path, mmap_mode="r")[first + start : first + stop])


@dataclass(frozen=True)
class Run:
    """Documents [start, stop) of an intermediate shard."""

    shard: int
    start: int
    stop: int


@dataclass(frozen=True)
class KeyRange:
    """Documents of all intermediate shards with keys in [begin, end)."""

    begin: int
    end: int


@dataclass(frozen=True)
class Arrangement:
    """What stays of a split, and what each output shard is made of.

    Attributes:
        tasks: For each shard, its runs, or its range of keys.
        documents: Number of documents.
        tokens: Number of tokens.
        text_bytes: Bytes of their texts in UTF-8.
    """

    tasks: Sequence[tuple[Run, ...]] | Sequence[KeyRange]
    documents: int
    tokens: int
    text_bytes: int


def arrange(split: IntermediateSplit, shard_tokens: int, shuffle: bool) -> Arrangement:
    """Decides what goes into which shard, by reading sidecars only.

    Args:
        split: The intermediate shards.
        shard_tokens: In the order of the input, a shard ends with the document that reaches this number; shuffled, it
            has about as many.
        shuffle: Whether the intermediate shards are sorted by random keys.

    Returns:
        The plan.
    """
    documents = tokens = text_bytes = 0
    for shard, record in enumerate(split.shards):
        kept = split.kept(shard, 0, record.documents)
        rows = split.documents(shard)
        documents += int(kept.sum())
        tokens += int(rows["length"][kept].sum(dtype=np.int64))
        text_bytes += int(rows["size"][kept].sum(dtype=np.int64))
    tasks = _key_ranges(split, -(-tokens // shard_tokens)) if shuffle else list(_runs(split, shard_tokens))
    return Arrangement(tasks, documents, tokens, text_bytes)


def _key_ranges(split: IntermediateSplit, count: int) -> list[KeyRange]:
    """Cuts the range of keys evenly; ranges without a document, as in a tiny corpus, make no shard."""
    edges = [(number << 64) // max(count, 1) for number in range(count + 1)]
    documents = np.zeros(count, np.int64)
    for shard, record in enumerate(split.shards):
        kept = np.concatenate([[0], np.cumsum(split.kept(shard, 0, record.documents))])
        inner = np.searchsorted(split.documents(shard)["key"], np.array(edges[1:-1], np.uint64))
        documents += np.diff(kept[[0, *inner.tolist(), record.documents]])
    return [KeyRange(edges[number], edges[number + 1]) for number in np.flatnonzero(documents).tolist()]


def _runs(split: IntermediateSplit, shard_tokens: int) -> Iterator[tuple[Run, ...]]:
    runs: list[Run] = []
    taken = 0
    for shard, record in enumerate(split.shards):
        lengths = np.where(split.kept(shard, 0, record.documents), split.documents(shard)["length"], 0)
        ends = np.cumsum(lengths, dtype=np.int64)
        start = 0
        while start < record.documents:
            before = int(ends[start - 1]) if start else 0
            stop = int(np.searchsorted(ends, before + shard_tokens - taken)) + 1
            runs.append(Run(shard, start, min(stop, record.documents)))
            taken += int(ends[runs[-1].stop - 1]) - before
            start = runs[-1].stop
            if taken >= shard_tokens:
                yield tuple(runs)
                runs, taken = [], 0
    if taken:
        yield tuple(runs)


def build_arranged(
    split: IntermediateSplit,
    arrangement: Arrangement,
    directory: Path,
    journal: Path,
    workers: int,
    progress: Callable[[ShardRecord], object],
) -> list[ShardRecord]:
    """Writes the shards of a plan.

    Args:
        split: The intermediate shards.
        arrangement: What to write.
        directory: Where the shards go.
        journal: File that lists finished shards.
        workers: Number of processes; each holds one shard in memory.
        progress: Called with each finished shard.

    Returns:
        The shards.

    Raises:
        DataError: The disk is full or fails, or a worker died; finished shards stay.
    """
    tasks: Sequence[Any] = arrangement.tasks
    return build_shards(directory, journal, tasks, functools.partial(_build, split), workers, progress)


def _build(split: IntermediateSplit, task: tuple[Run, ...] | KeyRange, directory: Path, index: int) -> ShardRecord:
    shuffled = isinstance(task, KeyRange)
    runs = _runs_of_keys(split, task) if isinstance(task, KeyRange) else task
    documents: list[NDArray[np.unsignedinteger]] = []
    keys = []
    for run in runs:
        rows = np.array(split.documents(run.shard)[run.start : run.stop])
        kept = split.kept(run.shard, run.start, run.stop)
        keys.append(rows["key"][kept])
        documents += _read(split, run, rows, kept)
    order = np.argsort(np.concatenate(keys), kind="stable") if shuffled else np.arange(len(documents))
    writer = ShardWriter(directory, index, split.dtype, split.vocab_size)
    try:
        for number in order:
            writer.add(documents[number])
        return writer.finish()
    except BaseException:
        writer.abandon()
        raise


def _runs_of_keys(split: IntermediateSplit, keys: KeyRange) -> Iterator[Run]:
    for shard in range(len(split.shards)):
        rows = split.documents(shard)
        start, stop = (
            bisect.bisect_left(rows, edge, key=lambda row: int(row["key"])) for edge in (keys.begin, keys.end)
        )
        if start < stop:
            yield Run(shard, start, stop)


def _read(
    split: IntermediateSplit, run: Run, rows: NDArray[np.void], kept: NDArray[np.bool_]
) -> list[NDArray[np.unsignedinteger]]:
    record = split.shards[run.shard]
    begin = int(rows["offset"][0])
    end = int(rows["offset"][-1]) + int(rows["length"][-1])
    tokens = ShardReader(split.directory / record.file, record, split.dtype).read(begin, end)
    documents = np.split(tokens, rows["offset"][1:].astype(np.int64) - begin)
    return [document for document, stays in zip(documents, kept, strict=True) if stays]
