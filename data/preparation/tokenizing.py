"""Phase one: reads the inputs, encodes them in workers and hands the documents to the writers of the splits."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.preparation.chunks import read_chunks
from data.preparation.encoding import (
    TRAIN,
    VALIDATION,
    EncodedChunk,
    EncodingSettings,
    NumberedChunk,
    Position,
    chunk_encoder,
)
from data.preparation.progress import Progress
from data.preparation.read_ahead import read_ahead
from data.preparation.split_writer import SplitWriter
from data.preparation.workers import WorkerPool

MAXIMUM_THREADS = 4
CHUNKS_AHEAD = 4


@dataclass(frozen=True)
class TokenizingJob:
    """What to read and how.

    Attributes:
        inputs: Files of the training split.
        validation_inputs: Files of the validation split.
        validation_fraction: Or: share of the documents that goes there.
        tokenizer: Tokenizer file.
        text_field: Field or column with the text.
        min_tokens: Shorter documents are rejected.
        hash_documents: Whether writers need hashes of the texts.
        workers: Number of processes.
        progress: Whether to show progress.
    """

    inputs: tuple[Path, ...]
    validation_inputs: tuple[Path, ...]
    validation_fraction: float
    tokenizer: Path
    text_field: str
    min_tokens: int
    hash_documents: bool
    workers: int
    progress: bool


def tokenize(job: TokenizingJob, writers: Mapping[str, SplitWriter]) -> None:
    """Fills and finishes the writers; input that lies before the position of all of them is not opened.

    Args:
        job: What to read.
        writers: One for each split.

    Raises:
        DataError: Bad input, or a worker died.
        OSError: The disk is full or fails.
    """
    paths = job.inputs + job.validation_inputs
    settings = EncodingSettings(
        tokenizer=job.tokenizer,
        text_field=job.text_field,
        validation_fraction=job.validation_fraction,
        validation_from=len(job.inputs),
        min_tokens=job.min_tokens,
        hash_documents=job.hash_documents,
        finished={split: writer.position for split, writer in writers.items()},
    )
    start = _start(job, settings.finished)
    sizes = [path.stat().st_size for path in paths]
    pool: WorkerPool[NumberedChunk, EncodedChunk] = WorkerPool(functools.partial(chunk_encoder, settings), job.workers)
    # Unpacking takes a thread; one of xz feeds about 16 workers.
    threads = 0 if job.workers == 1 else min(1 + job.workers // 16, MAXIMUM_THREADS)
    consumed = dict.fromkeys(range(len(paths)), 0)
    with pool, Progress("tokenizing", "B", sum(sizes), sum(sizes[: start.file]), job.progress) as progress:
        for encoded in pool.map(_chunks(paths, job.text_field, start, threads)):
            for split, documents in encoded.splits.items():
                writers[split].take(encoded.file, documents)
            tokens = sum(len(documents.tokens) for documents in encoded.splits.values())
            progress.update(encoded.consumed - consumed[encoded.file], tokens)
            consumed[encoded.file] = encoded.consumed
    for writer in writers.values():
        writer.finish()


def _start(job: TokenizingJob, finished: Mapping[str, Position]) -> Position:
    """The first place whose documents some split still needs."""
    needed = {TRAIN: Position(0, 0), VALIDATION: Position(len(job.inputs) if job.validation_inputs else 0, 0)}
    return min(max(needed[split], position) for split, position in finished.items())


def _chunks(paths: Sequence[Path], text_field: str, start: Position, threads: int) -> Iterator[NumberedChunk]:
    def read(file: int) -> Iterator[NumberedChunk]:
        for chunk in read_chunks(paths[file], text_field):
            if file > start.file or chunk.next_line > start.line + 1:
                yield NumberedChunk(file, chunk)

    sources = (functools.partial(read, file) for file in range(start.file, len(paths)))
    return read_ahead(sources, threads, CHUNKS_AHEAD)
