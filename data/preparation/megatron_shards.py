"""Cuts indexed datasets into shards: which documents each shard holds, how one is built, and how it is checked."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.manifest import Manifest, ShardRecord
from data.preparation.indexed_dataset import IndexedDataset
from data.shard_writer import ShardWriter
from data.shards import ShardReader, read_document_lengths

EndOfText = Literal["strip", "keep"]
PLANNED_AT_ONCE = 2**20
TOKENS_AT_ONCE = 2**22


@dataclass(frozen=True)
class Selection:
    """Which documents of a dataset go to a split.

    Attributes:
        dataset: Number of the dataset in its list.
        fraction: Share of the documents, chosen by their numbers, that go to validation.
        chosen: Whether those are meant, or the others.
    """

    dataset: int
    fraction: float
    chosen: bool

    def mask(self, first: int, last: int) -> NDArray[np.bool_]:
        """Says of each document [first, last) whether it is selected."""
        if not self.fraction:
            return np.full(last - first, not self.chosen)
        # The mixing function of splitmix64: evenly spread, and the same everywhere.
        mixed = np.arange(first, last, dtype=np.uint64) + np.uint64(self.dataset << 40)
        mixed *= np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        mixed ^= mixed >> np.uint64(31)
        # 53 bits are what a double holds exactly.
        drawn: NDArray[np.bool_] = (mixed >> np.uint64(11)) < np.uint64(round(self.fraction * 2**53))
        return drawn == self.chosen


@dataclass(frozen=True)
class EndOfTextRule:
    """What is done with an end of text.

    Attributes:
        eos_id: The token.
        treatment: Whether one that ends a document is left out.
    """

    eos_id: int
    treatment: EndOfText


@dataclass(frozen=True)
class ShardTask:
    """What one shard is made of.

    Attributes:
        prefix: The dataset.
        first: First document.
        last: One past the last document.
        selection: Which documents in between.
        vocab_size: One more than the largest token id.
        end_of_text: What is done with an end of text.
        dtype: Stored token type.
    """

    prefix: Path
    first: int
    last: int
    selection: Selection
    vocab_size: int
    end_of_text: EndOfTextRule
    dtype: str


@dataclass(frozen=True)
class PlannedShard:
    """A range of documents that becomes a shard.

    Attributes:
        first: First document.
        last: One past the last document.
    """

    first: int
    last: int


@dataclass(frozen=True)
class Plan:
    """What becomes of the selected documents of a dataset.

    Attributes:
        shards: The shards; none if there are only empty documents.
        documents: Selected documents, empty ones included.
        empty_documents: Those that hold no token but a stripped end of text.
        tokens: Tokens of the selected documents as they are stored in the dataset.
    """

    shards: tuple[PlannedShard, ...]
    documents: int
    empty_documents: int
    tokens: int


def plan_shards(dataset: IndexedDataset, selection: Selection, shard_tokens: int, rule: EndOfTextRule) -> Plan:
    """Cuts the selected documents of a dataset into shards, by their lengths.

    Args:
        dataset: The dataset.
        selection: Which documents.
        shard_tokens: A shard ends with the document that reaches this number of tokens.
        rule: What is done with an end of text.

    Returns:
        The shards, none of which is empty, and what lies in the dataset.

    Raises:
        DataError: The dataset cannot be read.
    """
    shards: list[PlannedShard] = []
    begin, weight = 0, 0
    documents = empty_documents = tokens = 0
    for start in range(0, dataset.documents, PLANNED_AT_ONCE):
        stop = min(start + PLANNED_AT_ONCE, dataset.documents)
        selected = selection.mask(start, stop)
        offsets = dataset.offsets(start, stop)
        lengths = np.where(selected, np.diff(offsets), 0)
        single = _weights(dataset, offsets, lengths, rule)
        weights = np.cumsum(single)
        documents += int(selected.sum())
        empty_documents += int((selected & (single == 0)).sum())
        tokens += int(lengths.sum())
        while (cut := int(np.searchsorted(weights, shard_tokens - weight))) < len(weights):
            shards.append(PlannedShard(begin, start + cut + 1))
            begin, weight = start + cut + 1, -int(weights[cut])
        weight += int(weights[-1])
    if weight:
        shards.append(PlannedShard(begin, dataset.documents))
    elif shards:
        shards[-1] = PlannedShard(shards[-1].first, dataset.documents)
    return Plan(tuple(shards), documents, empty_documents, tokens)


def _weights(
    dataset: IndexedDataset, offsets: NDArray[np.int64], lengths: NDArray[np.int64], rule: EndOfTextRule
) -> NDArray[np.int64]:
    """Tokens of each document that are sure to stay; 0 only if none stays: [n] from [n + 1] offsets, [n] lengths."""
    if rule.treatment == "keep":
        return lengths
    # One less, for the end of text that may be stripped; only where nothing else may be left it is worth a look.
    weights = np.maximum(lengths - 1, 0)
    alone = np.flatnonzero(lengths == 1)
    for run in np.split(alone, np.flatnonzero(np.diff(offsets[alone]) != 1) + 1):
        if len(run):
            begin = int(offsets[run[0]])
            weights[run] = dataset.read(begin, begin + len(run)).astype(np.int64) != rule.eos_id
    return weights


def build_shard(task: ShardTask, directory: Path, index: int) -> ShardRecord:
    """Writes a shard.

    Args:
        task: What it holds.
        directory: The split's directory.
        index: Number of the shard.

    Returns:
        Its entry for the manifest.

    Raises:
        DataError: The dataset cannot be read, or a token is not in the vocabulary.
    """
    writer = ShardWriter(directory, index, task.dtype, task.vocab_size)
    try:
        for _, tokens in _documents(task):
            writer.add(tokens)
        return writer.finish()
    except BaseException:
        writer.abandon()
        raise


def compare_shard(task: ShardTask, directory: Path, manifest: Manifest, index: int) -> int:
    """Compares a shard with its source, token by token.

    Args:
        task: What it holds.
        directory: The split's directory.
        manifest: The split's manifest.
        index: Number of the shard.

    Returns:
        Number of tokens compared.

    Raises:
        DataError: They differ; names the shard and the first document that does.
    """
    record = manifest.shards[index]
    lengths = read_document_lengths(directory, record)
    reader = ShardReader(directory / record.file, record, manifest.dtype)
    position, found = 0, 0
    where = f"{directory / record.file} differs from {task.prefix}"
    again = "delete the output and import it again"
    for number, tokens in _documents(task):
        length = int(lengths[found]) if found < len(lengths) else 0
        if length != len(tokens):
            raise DataError(f"{where}: document {number:,} has {length:,} tokens instead of {len(tokens):,}; {again}")
        different = reader.read(position, position + length) != tokens
        if different.any():
            raise DataError(f"{where}: document {number:,}, from its token {int(different.argmax()):,} on; {again}")
        position, found = position + length, found + 1
    if found != len(lengths):
        raise DataError(f"{where}: it holds {len(lengths):,} documents instead of {found:,}; {again}")
    return position


@functools.lru_cache(maxsize=4)
def _open(prefix: Path) -> IndexedDataset:
    return IndexedDataset(prefix)


def _documents(task: ShardTask) -> Iterator[tuple[int, NDArray[np.unsignedinteger]]]:
    """Yields the number and the tokens of each document of a shard that is not empty."""
    dataset = _open(task.prefix)
    for first, last in _runs(task, dataset):
        offsets = dataset.offsets(first, last)
        stored = dataset.read(int(offsets[0]), int(offsets[-1]))
        _check_vocabulary(task, stored, first, offsets)
        tokens: NDArray[np.unsignedinteger] = stored.astype(task.dtype)
        starts, ends = offsets[:-1] - offsets[0], offsets[1:] - offsets[0]
        if task.end_of_text.treatment == "strip" and len(tokens):
            ends = ends - ((ends > starts) & (tokens[np.maximum(ends, 1) - 1] == task.end_of_text.eos_id))
        for number, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True), first):
            if end > start:
                yield number, tokens[start:end]


def _runs(task: ShardTask, dataset: IndexedDataset) -> Iterator[tuple[int, int]]:
    """Ranges of selected documents without a gap, each short enough to be read at once."""
    for start in range(task.first, task.last, PLANNED_AT_ONCE):
        stop = min(start + PLANNED_AT_ONCE, task.last)
        selected = np.flatnonzero(task.selection.mask(start, stop))
        if len(selected) == 0:
            continue
        offsets = dataset.offsets(start, stop)
        # A run ends at a gap, and where another portion of the tokens begins.
        portions = offsets[selected] // TOKENS_AT_ONCE
        ends = np.flatnonzero((np.diff(selected) != 1) | (np.diff(portions) != 0)) + 1
        for run in np.split(selected, ends):
            yield start + int(run[0]), start + int(run[-1]) + 1


def _check_vocabulary(task: ShardTask, tokens: NDArray[np.integer], first: int, offsets: NDArray[np.int64]) -> None:
    if len(tokens) == 0 or (int(tokens.max()) < task.vocab_size and int(tokens.min()) >= 0):
        return
    position = int(((tokens < 0) | (tokens >= task.vocab_size)).argmax())
    number = first + int(np.searchsorted(offsets - offsets[0], position, side="right")) - 1
    raise DataError(
        f"{task.prefix}: document {number:,} holds the token id {int(tokens[position])}, but the vocabulary has "
        f"{task.vocab_size}; give the --tokenizer that made this dataset"
    )
