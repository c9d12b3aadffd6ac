"""Writes the shards of one split and remembers finished ones, so that an interrupted preparation goes on."""

import os
from pathlib import Path

import numpy as np
import pydantic
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from data.files import write_atomically
from data.manifest import ShardRecord
from data.shards import ShardWriter

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
        self._writer: ShardWriter | None = None
        self._last_document = -1
        directory.mkdir(exist_ok=True)
        self._take_over()

    def _take_over(self) -> None:
        journal = self._directory / JOURNAL_NAME
        entries = _read_journal(journal)
        kept: list[_JournalEntry] = []
        for entry in entries:
            if not _has_size(self._directory / entry.shard.file, entry.shard.bytes):
                break
            if not _has_size(self._directory / entry.shard.lengths_file, entry.shard.lengths_bytes):
                break
            kept.append(entry)
        self.shards = [entry.shard for entry in kept]
        self.resume_after = kept[-1].last_document if kept else -1
        finished = {name for shard in self.shards for name in (shard.file, shard.lengths_file)}
        self._remove_all_but(finished | {JOURNAL_NAME})
        write_atomically(journal, b"".join(_line(entry) for entry in kept))

    def _remove_all_but(self, kept: set[str]) -> None:
        for path in self._directory.iterdir():
            if path.name not in kept:
                path.unlink()

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
        _append(self._directory / JOURNAL_NAME, _line(entry))

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
        for path in self._directory.glob(".*.tmp"):
            path.unlink()


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _read_journal(path: Path) -> list[_JournalEntry]:
    if not path.is_file():
        return []
    entries = []
    for line in path.read_bytes().splitlines():
        try:
            entries.append(_JournalEntry.model_validate_json(line))
        except pydantic.ValidationError:
            break  # The line that was being written when the run was killed.
    return entries


def _line(entry: _JournalEntry) -> bytes:
    return entry.model_dump_json().encode() + b"\n"


def _append(path: Path, line: bytes) -> None:
    with open(path, "ab") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
