"""Builds the shards of a directory in several processes; an interrupted call goes on where it stopped."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field

from data.errors import DataError
from data.manifest import ShardRecord
from data.preparation.journal import Journal, has_size
from data.preparation.workers import WorkerPool

Task = TypeVar("Task")
Build = Callable[[Task, Path, int], ShardRecord]


class _FinishedShard(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    index: int = Field(..., ge=0, description="Number of the shard.")
    shard: ShardRecord = Field(..., description="The shard.")


def build_shards(
    directory: Path,
    journal_path: Path,
    tasks: Sequence[Task],
    build: Build[Task],
    workers: int,
    progress: Callable[[ShardRecord], object] | None = None,
) -> list[ShardRecord]:
    """Builds one shard from each task, in any order; shards that an earlier call finished are kept.

    The caller sees to it that tasks and journal belong together, and deletes the journal when the whole is complete.

    Args:
        directory: Where the shards go; made if absent, and anything else in it is deleted.
        journal_path: File that lists finished shards, outside `directory`.
        tasks: What each shard is made of; can be pickled.
        build: Writes a shard with `data.shard_writer.ShardWriter` from (task, directory, index of the task), a pure
            function of the task; can be pickled.
        workers: Number of processes, at least 1.
        progress: Called with each shard, first with those of earlier calls.

    Returns:
        The shards in the order of the tasks.

    Raises:
        DataError: The disk is full or fails, or a worker died; finished shards stay.
    """
    progress = progress or (lambda shard: None)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        journal = Journal(journal_path, _FinishedShard)
        finished = _take_over(directory, journal, len(tasks))
        for shard in finished.values():
            progress(shard)
        missing = [(index, task) for index, task in enumerate(tasks) if index not in finished]
        pool: WorkerPool[tuple[int, Task], tuple[int, ShardRecord]] = WorkerPool(
            functools.partial(_builder, directory, build), min(workers, max(len(missing), 1)), in_hand=1
        )
        with pool:
            for index, shard in pool.map(missing, ordered=False):
                journal.append(_FinishedShard(index=index, shard=shard))
                finished[index] = shard
                progress(shard)
    except OSError as error:
        raise DataError(
            f"{error.filename or directory}: {error.strerror}; finished shards are kept: free space or fix "
            "permissions and give the same command again"
        ) from error
    finally:
        remove_temporary_files(directory)
    return [finished[index] for index in range(len(tasks))]


def _builder(directory: Path, build: Build[Task]) -> Callable[[tuple[int, Task]], tuple[int, ShardRecord]]:
    def build_one(numbered: tuple[int, Task]) -> tuple[int, ShardRecord]:
        index, task = numbered
        return index, build(task, directory, index)

    return build_one


def _take_over(directory: Path, journal: Journal[_FinishedShard], count: int) -> dict[int, ShardRecord]:
    kept = [entry for entry in journal.read() if entry.index < count and is_intact(directory, entry.shard)]
    journal.rewrite(kept)
    remove_all_but(directory, [entry.shard for entry in kept])
    return {entry.index: entry.shard for entry in kept}


def is_intact(directory: Path, shard: ShardRecord) -> bool:
    """Says whether both files of a shard are there in full size.

    Args:
        directory: The shard's directory.
        shard: Its record.
    """
    return has_size(directory / shard.file, shard.bytes) and has_size(
        directory / shard.lengths_file, shard.lengths_bytes
    )


def remove_all_but(directory: Path, shards: Sequence[ShardRecord]) -> None:
    """Deletes the files of a directory that belong to no known shard.

    Args:
        directory: The shards' directory.
        shards: What to keep, with all files whose names begin like theirs up to the first dot.
    """
    kept = {shard.file.partition(".")[0] for shard in shards}
    for path in directory.iterdir():
        if path.name.partition(".")[0] not in kept:
            path.unlink()


def remove_temporary_files(directory: Path) -> None:
    """Deletes what writers that were interrupted have left.

    Args:
        directory: The shards' directory.
    """
    for path in directory.glob(".*.tmp"):
        path.unlink()
