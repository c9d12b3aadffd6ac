"""Writes the shards of one split and remembers finished ones, so that an interrupted preparation goes on."""

import itertools
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from data.manifest import ShardRecord
from data.preparation.journal import Journal
from data.preparation.parallel_shards import is_intact, remove_all_but, remove_temporary_files
from data.shard_writer import ShardWriter

JOURNAL_NAME = "finished_shards.jsonl"


class _JournalEntry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    shard: ShardRecord = Field(..., description="A finished shard.")
    last_document: int = Field(..., ge=0, description="Number, in the whole input, of the last document in it.")


class SplitWriter:
    """Distributes the documents of one split over shards.

    Attributes:
        shards: Finished shards.
        resume_after: Number of the last document that earlier finished shards hold; -1 if there are none.
    """

    def __init__(self, directory: Path, dtype: str, shard_tokens: int) -> None:
        """Opens the split, taking over the shards that an interrupted run finished.

        Args:
            directory: The split's directory; made if absent.
            dtype: Stored token type.
            shard_tokens: A shard ends with the document that reaches this number of tokens.
        """
        self.shards: list[ShardRecord] = []
        self.resume_after = -1
        self._directory = directory
        self._dtype = dtype
        self._shard_tokens = shard_tokens
        self._journal = Journal(directory / JOURNAL_NAME, _JournalEntry)
        self._writer: ShardWriter | None = None
        self._last_document = -1
        directory.mkdir(exist_ok=True)
        self._take_over()

    def _take_over(self) -> None:
        kept = list(itertools.takewhile(lambda entry: is_intact(self._directory, entry.shard), self._journal.read()))
        self.shards = [entry.shard for entry in kept]
        self.resume_after = kept[-1].last_document if kept else -1
        remove_all_but(self._directory, self.shards)
        self._journal.rewrite(kept)

    def add(self, number: int, tokens: NDArray[np.uint32]) -> None:
        """Appends a document.

        Args:
            number: Its number in the whole input, rising.
            tokens: Its token ids, at least one.
        """
        if self._writer is None:
            self._writer = ShardWriter(self._directory, len(self.shards), self._dtype)
        self._writer.add(tokens)
        self._last_document = number
        if self._writer.tokens >= self._shard_tokens:
            self._finish_shard()

    def _finish_shard(self) -> None:
        if self._writer is None:
            return
        shard = self._writer.finish()
        self._writer = None
        self.shards.append(shard)
        entry = _JournalEntry(shard=shard, last_document=self._last_document)
        self._journal.append(entry)

    def finish(self) -> tuple[ShardRecord, ...]:
        """Completes the last shard.

        Returns:
            All shards.
        """
        self._finish_shard()
        (self._directory / JOURNAL_NAME).unlink(missing_ok=True)
        return tuple(self.shards)

    def abandon(self) -> None:
        """Deletes the unfinished shard; finished ones stay for the next run."""
        if self._writer is not None:
            self._writer.abandon()
            self._writer = None
        # An interrupt can hit between the creation of a file and the moment when somebody knows of it.
        remove_temporary_files(self._directory)
