"""Distributes the documents of one split over shards and remembers finished ones."""

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from data.errors import DataError
from data.files import fsync_path
from data.manifest import ShardRecord
from data.preparation.chunks import Rejection
from data.preparation.encoding import EncodedDocuments, Position
from data.preparation.journal import Journal
from data.preparation.parallel_shards import is_intact, remove_all_but, remove_temporary_files
from data.preparation.records import HARMLESS_REASONS, RejectedDocument, SplitCounts


class StoredDocument(NamedTuple):
    """A document on its way into a shard.

    Attributes:
        tokens: [t] token ids.
        size: Bytes of its text in UTF-8.
        hashed: [2] hash of the text, or [0].
    """

    tokens: NDArray[np.unsignedinteger]
    size: int
    hashed: NDArray[np.uint64]


class DocumentWriter(Protocol):
    """Writes one shard."""

    @property
    def is_full(self) -> bool:
        """Whether the shard ends with the last document."""

    def add(self, document: StoredDocument) -> None:
        """Appends a document."""

    def finish(self) -> ShardRecord:
        """Completes the shard."""

    def abandon(self) -> None:
        """Deletes the unfinished shard."""


class _FinishedShard(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    shard: ShardRecord = Field(..., description="A finished shard.")
    position: Position = Field(..., description="The last place in the input that was dealt with.")
    counts: SplitCounts = Field(..., description="Counters of the split up to there.")
    rejected_bytes: int = Field(..., ge=0, description="Size of the list of rejected documents up to there.")


class SplitWriter:
    """Takes over the shards that an interrupted run finished, and adds to them.

    Attributes:
        shards: Finished shards.
        position: The last place in the input that finished shards and counters deal with; (-1, 0) if there are none.
    """

    def __init__(
        self,
        directory: Path,
        progress: Path,
        open_shard: Callable[[Path, int], DocumentWriter],
        fail_on_malformed: bool,
    ) -> None:
        """Opens the split.

        Args:
            directory: Where its shards go; made if absent.
            progress: Path, without ending, of the journal and of the list of rejected documents.
            open_shard: Opens the shard of a directory and a number.
            fail_on_malformed: Whether malformed input is an error, instead of counted.
        """
        self.shards: list[ShardRecord] = []
        self.position = Position(-1, 0)
        self.rejected_path = progress.with_suffix(".rejected.jsonl")
        self._directory = directory
        self._journal = Journal(progress.with_suffix(".jsonl"), _FinishedShard)
        self._open_shard = open_shard
        self._fail_on_malformed = fail_on_malformed
        self._writer: DocumentWriter | None = None
        self._last = self.position
        directory.mkdir(parents=True, exist_ok=True)
        progress.parent.mkdir(parents=True, exist_ok=True)
        counts, rejected_bytes = self._take_over()
        self._text_bytes = counts.text_bytes
        self._rejected_counts = dict(counts.rejected)
        self._rejected_file = open(self.rejected_path, "ab")  # noqa: SIM115  closed by finish or abandon
        self._rejected_file.truncate(rejected_bytes)
        self._rejected_file.seek(0, os.SEEK_END)

    def _take_over(self) -> tuple[SplitCounts, int]:
        kept = list(itertools.takewhile(lambda entry: is_intact(self._directory, entry.shard), self._journal.read()))
        self.shards = [entry.shard for entry in kept]
        remove_all_but(self._directory, self.shards)
        self._journal.rewrite(kept)
        if not kept:
            return SplitCounts(), 0
        self.position = kept[-1].position
        return kept[-1].counts, kept[-1].rejected_bytes

    @property
    def counts(self) -> SplitCounts:
        """Counters of all that was taken."""
        return SplitCounts(text_bytes=self._text_bytes, rejected=dict(sorted(self._rejected_counts.items())))

    def take(self, file: int, documents: EncodedDocuments) -> None:
        """Adds what a chunk gave, in the order of its lines.

        Args:
            file: Number of the input file.
            documents: Documents and rejections.

        Raises:
            DataError: Malformed input, if that is an error.
        """
        rejections = iter(documents.rejections)
        rejection = next(rejections, None)
        has_hashes = len(documents.hashes) > 0
        end = 0
        for index, (line, length) in enumerate(zip(documents.lines, documents.lengths, strict=True)):
            while rejection is not None and rejection.line < line:
                self._reject(file, rejection)
                rejection = next(rejections, None)
            start, end = end, end + length
            hashed = documents.hashes[index if has_hashes else 0 :][:1].reshape(-1)
            self._last = Position(file, line)
            self._add(StoredDocument(documents.tokens[start:end], documents.sizes[index], hashed))
        while rejection is not None:
            self._reject(file, rejection)
            rejection = next(rejections, None)

    def _reject(self, file: int, rejection: Rejection) -> None:
        self._last = Position(file, rejection.line)
        self._rejected_counts[rejection.reason] = self._rejected_counts.get(rejection.reason, 0) + 1
        if rejection.reason in HARMLESS_REASONS:
            return
        if self._fail_on_malformed:
            raise DataError(rejection.message)
        self._rejected_file.write(RejectedDocument(**rejection._asdict()).model_dump_json().encode() + b"\n")

    def _add(self, document: StoredDocument) -> None:
        if self._writer is None:
            self._writer = self._open_shard(self._directory, len(self.shards))
        self._writer.add(document)
        self._text_bytes += document.size
        if self._writer.is_full:
            self._finish_shard()

    def _finish_shard(self) -> None:
        if self._writer is None:
            return
        shard = self._writer.finish()
        self._writer = None
        self.shards.append(shard)
        self._rejected_file.flush()
        os.fsync(self._rejected_file.fileno())
        self._journal.append(
            _FinishedShard(
                shard=shard, position=self._last, counts=self.counts, rejected_bytes=self._rejected_file.tell()
            )
        )

    def finish(self) -> None:
        """Completes the last shard."""
        self._finish_shard()
        self._rejected_file.close()
        fsync_path(self._directory)

    def abandon(self) -> None:
        """Deletes the unfinished shard; finished ones stay for the next run."""
        if self._writer is not None:
            self._writer.abandon()
            self._writer = None
        self._rejected_file.close()
        # An interrupt can hit between the creation of a file and the moment when somebody knows of it.
        remove_temporary_files(self._directory)
