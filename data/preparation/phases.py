"""The phases of a preparation: tokenize; then, if asked for, leave out duplicates and shuffle."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from data.files import fsync_path, write_atomically
from data.manifest import ShardRecord, dtype_for, parse_model
from data.preparation.duplicates import HashFile, find_kept
from data.preparation.encoding import TRAIN, VALIDATION
from data.preparation.intermediate import IntermediateWriter, hashes_path, intermediate_tokens
from data.preparation.progress import Progress
from data.preparation.rearranging import IntermediateSplit, arrange, build_arranged
from data.preparation.records import DUPLICATE, REJECTED_NAME, PreparationRequest, SplitCounts
from data.preparation.split_writer import DocumentWriter, SplitWriter, StoredDocument
from data.preparation.tokenizing import TokenizingJob, tokenize
from data.shard_writer import ShardWriter
from data.tokenizer import Tokenizer

# Random streams of the shuffle; never to be changed.
SPLIT_NUMBERS = {TRAIN: 0, VALIDATION: 1}
Made = dict[str, tuple[list[ShardRecord], SplitCounts]]


@dataclass(frozen=True)
class Job:
    """A preparation under way.

    Attributes:
        inputs: Files of the training split.
        validation_inputs: Files of the validation split.
        tokenizer: The tokenizer.
        request: What was asked for.
        partial: The directory that holds everything until the output is complete.
        workers: Number of processes.
        progress: Whether to show progress.
    """

    inputs: tuple[Path, ...]
    validation_inputs: tuple[Path, ...]
    tokenizer: Tokenizer
    request: PreparationRequest
    partial: Path
    workers: int
    progress: bool

    @property
    def output(self) -> Path:
        """What becomes the output."""
        return self.partial / "output"

    @property
    def progress_folder(self) -> Path:
        """Journals."""
        return self.partial / "progress"

    @property
    def intermediate(self) -> Path:
        """Intermediate shards."""
        return self.partial / "intermediate"

    @property
    def has_second_phase(self) -> bool:
        """Whether documents must be known before the first of them can be written to its place."""
        return self.request.remove_duplicates or self.request.shuffle_documents is not None


class _TokenizedSplit(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    shards: tuple[ShardRecord, ...] = Field(..., description="Intermediate shards.")
    counts: SplitCounts = Field(..., description="Counters.")


class _Tokenized(BaseModel):
    """Says that phase one is complete."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    splits: dict[str, _TokenizedSplit] = Field(..., description="By name.")


def make_shards(job: Job) -> Made:
    """Makes the shards of all splits, going on where an interrupted run stopped.

    Args:
        job: What to make.

    Returns:
        Shards and counters of each split.

    Raises:
        DataError: Bad input, a full disk or a dead worker; finished shards stay.
        OSError: The same, of the disk.
    """
    job.output.mkdir(exist_ok=True)
    job.progress_folder.mkdir(exist_ok=True)
    if not job.has_second_phase:
        return _tokenize(job, job.output)
    marker = job.partial / "tokenized.json"
    if not marker.exists():
        made = _tokenize(job, job.intermediate)
        splits = {
            split: _TokenizedSplit(shards=tuple(shards), counts=counts) for split, (shards, counts) in made.items()
        }
        write_atomically(marker, _Tokenized(splits=splits).model_dump_json().encode())
    return _rearrange(job, parse_model(_Tokenized, marker).splits)


def _tokenize(job: Job, directory: Path) -> Made:
    request = job.request
    writers: dict[str, SplitWriter] = {}
    try:
        for split in request.splits:
            writers[split] = SplitWriter(
                directory / split,
                job.progress_folder / f"tokenized-{split}",
                lambda folder, index, split=split: _open_shard(job, split, folder, index),  # type: ignore[misc]
                fail_on_malformed=request.on_malformed == "fail",
            )
        tokenize(
            TokenizingJob(
                inputs=job.inputs,
                validation_inputs=job.validation_inputs,
                validation_fraction=request.validation_fraction,
                tokenizer=job.tokenizer.path,
                text_field=request.text_field,
                min_tokens=request.min_tokens,
                hash_documents=request.remove_duplicates,
                workers=job.workers,
                progress=job.progress,
            ),
            writers,
        )
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        raise
    _join_rejected([writer.rejected_path for writer in writers.values()], job.output / REJECTED_NAME)
    return {split: (writer.shards, writer.counts) for split, writer in writers.items()}


class _FinalWriter:
    """Writes documents as they come."""

    def __init__(self, writer: ShardWriter, shard_tokens: int) -> None:
        self._writer = writer
        self._shard_tokens = shard_tokens
        self.finish = writer.finish
        self.abandon = writer.abandon

    @property
    def is_full(self) -> bool:
        return self._writer.tokens >= self._shard_tokens

    def add(self, document: StoredDocument) -> None:
        self._writer.add(document.tokens)


def _open_shard(job: Job, split: str, directory: Path, index: int) -> DocumentWriter:
    vocab_size = job.tokenizer.vocab_size
    dtype = dtype_for(vocab_size)
    if not job.has_second_phase:
        return _FinalWriter(ShardWriter(directory, index, dtype, vocab_size), job.request.shard_tokens)
    return IntermediateWriter(
        directory,
        index,
        dtype,
        vocab_size,
        job.request.shuffle_documents,
        SPLIT_NUMBERS[split],
        intermediate_tokens(job.request.shard_tokens),
    )


def _join_rejected(parts: list[Path], target: Path) -> None:
    """Makes one list of the splits' lists; none if nothing was rejected."""
    target.unlink(missing_ok=True)
    if not any(part.stat().st_size for part in parts):
        return
    with open(target, "wb") as file:
        for part in parts:
            with open(part, "rb") as source:
                shutil.copyfileobj(source, file)
    fsync_path(target)


def _rearrange(job: Job, tokenized: Mapping[str, _TokenizedSplit]) -> Made:
    kept_path = job.partial / "kept.npy" if job.request.remove_duplicates else None
    vocab_size = job.tokenizer.vocab_size
    splits: dict[str, IntermediateSplit] = {}
    first = 0
    # Validation comes first: of a document in both, it keeps its own, so that training never sees it.
    for name in sorted(tokenized, key=lambda name: name != VALIDATION):
        shards = tokenized[name].shards
        directory = job.intermediate / name
        splits[name] = IntermediateSplit(directory, shards, dtype_for(vocab_size), vocab_size, kept_path, first)
        first += sum(shard.documents for shard in shards)
    if kept_path is not None and not kept_path.exists():
        hashes = [
            HashFile(hashes_path(split.directory, index), shard.documents)
            for split in splits.values()
            for index, shard in enumerate(split.shards)
        ]
        find_kept(hashes, kept_path, job.workers, shown=job.progress)
    return {name: _write_arranged(job, name, splits[name], tokenized[name]) for name in tokenized}


def _write_arranged(
    job: Job, name: str, split: IntermediateSplit, tokenized: _TokenizedSplit
) -> tuple[list[ShardRecord], SplitCounts]:
    shuffle = job.request.shuffle_documents is not None
    arrangement = arrange(split, job.request.shard_tokens, shuffle)
    title = f"{'shuffling' if shuffle else 'writing'} {name}"
    journal = job.progress_folder / f"arranged-{name}.jsonl"
    with Progress(title, "token", arrangement.tokens, shown=job.progress) as progress:
        shards = build_arranged(
            split,
            arrangement,
            job.output / name,
            journal,
            job.workers,
            lambda shard: progress.update(shard.tokens, shard.tokens),
        )
    rejected = dict(tokenized.counts.rejected)
    if duplicates := sum(shard.documents for shard in split.shards) - arrangement.documents:
        rejected[DUPLICATE] = duplicates
    return shards, SplitCounts(text_bytes=arrangement.text_bytes, rejected=dict(sorted(rejected.items())))
