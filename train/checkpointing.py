"""Saves and restores a run together with the other ranks."""

import os
import subprocess
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed
from torch import Tensor

from checkpoints.engine_state import engine_fragments
from checkpoints.errors import CheckpointError
from checkpoints.fragments import write_fragments
from checkpoints.records import FileRecord, Fragment
from checkpoints.second_level import BackgroundCopies, SecondLevel
from checkpoints.store import CheckpointStore, LoadedCheckpoint
from data.streaming.source import BadShard
from train.config import RunConfig
from train.host_copies import HostCopies
from train.rank_zero import on_rank_zero

Fragments = list[tuple[Fragment, Tensor]]


@dataclass(frozen=True)
class Progress:
    """Where a run stands; with the weights and moments, all there is to restore.

    Nothing is drawn at random after initialization (no dropout; the data order is a function of the position), so there
    is no generator state to keep.

    Attributes:
        step: steps done.
        optimizer_steps: updates done; fewer than step if a batch had no valid target.
        consumed_sequences: position in the stream of sequences.
        stream: what that stream is made of (data.streaming.identity.StreamIdentity as JSON).
        skipped_steps: steps without an update because something was not finite, or the loss a spike.
        skipped_in_a_row: those of them directly before this point.
        empty_sequences: of those consumed, how many bad shards would have held (data.bad_shards=skip).
        bad_shards: shards that were found bad and are left out for good.
        left_out: positions in the stream whose global batches are not read again after a roll-back.
        validation_due: the validation after this step has not been done, or was interrupted.
        tasks_due: so have the tasks.
        recent_losses: those against which a spike is measured.
    """

    step: int
    optimizer_steps: int
    consumed_sequences: int
    stream: dict[str, Any]
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    empty_sequences: int = 0
    bad_shards: tuple[BadShard, ...] = ()
    left_out: tuple[int, ...] = ()
    validation_due: bool = False
    tasks_due: bool = False
    recent_losses: tuple[float, ...] = ()


@dataclass(frozen=True)
class FinishedSave:
    """How a checkpoint was written.

    Attributes:
        step: its step.
        path: the step directory; None if it was not published.
        blocked_seconds: how long training waited for it.
        seconds: from the beginning to the publication.
        error: why it was not published; a CheckpointError if a restart would meet it again, others if a rank was lost.
    """

    step: int
    path: Path | None
    blocked_seconds: float
    seconds: float
    error: Exception | None = None


class RunCheckpoints:
    """The checkpoints of a run; every method is called by all ranks together.

    A save copies the tensors and returns; a thread of each rank writes the copy, and rank 0 publishes when all have
    written theirs. One save is under way at a time: the next waits for it.
    """

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.config = config
        self.store = CheckpointStore(folder, config.checkpoint.keep_last, config.checkpoint.keep_every)
        self._copies = _second_level(config) if torch.distributed.get_rank() == 0 else None
        self._host_copies = HostCopies()
        # A group of its own: the threads' messages must not meet those of training.
        self._group = torch.distributed.new_group(backend="gloo")
        self._thread: threading.Thread | None = None
        self._finished: list[FinishedSave] = []
        self._has_failed = False

    def newest(self) -> LoadedCheckpoint | None:
        """The newest intact checkpoint, found and verified by rank 0; fetched if the second place has a newer one.

        Raises:
            CheckpointError: there are checkpoints, but none is intact.
        """
        return on_rank_zero(self._newest)

    def _newest(self) -> LoadedCheckpoint | None:
        steps = self.store.complete_steps()
        try:
            copied = self._copies.newest_step() if self._copies else None
            if self._copies and copied is not None and (not steps or steps[-1] < copied):
                print(f"fetching the checkpoint of step {copied} from {self._copies.place}", flush=True)
                self._copies.fetch_newest(self.store.root)
        except CheckpointError as error:
            if not steps:
                raise
            print(f"warning: {error}; going on from the run's own checkpoints", flush=True)
        return self.store.newest()

    def save(self, engine: Any, progress: Progress) -> None:
        """Begins a checkpoint; it becomes visible when all ranks have written their part.

        After one that failed it is waited for, so that all ranks know at the same step whether it failed again.

        """
        started = time.perf_counter()
        self.wait()
        asynchronous = self.config.checkpoint.asynchronous and not self._has_failed
        try:
            temporary = on_rank_zero(lambda: self.store.begin(progress.step))
        except CheckpointError as error:
            self._has_failed = True
            waited = time.perf_counter() - started
            self._finished.append(FinishedSave(progress.step, None, waited, waited, error))
            return
        fragments = engine_fragments(engine)
        if asynchronous:
            fragments = self._host_copies.copy(fragments)
        blocked = time.perf_counter() - started

        def finish() -> None:
            error: Exception | None = None
            path = None
            try:
                path = self._write_all(fragments, temporary, progress)
            except Exception as raised:  # a thread's error would be lost otherwise
                error = raised
            seconds = time.perf_counter() - started
            self._has_failed = error is not None
            self._finished.append(FinishedSave(progress.step, path, blocked, seconds, error))

        if not asynchronous:
            finish()
            self._finished[-1] = replace(self._finished[-1], blocked_seconds=self._finished[-1].seconds)
            return
        self._thread = threading.Thread(target=finish, name="checkpoint-writing", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Waits for the save under way, if any."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def finished(self) -> list[FinishedSave]:
        """Saves that have ended since the last call, in order; may differ between ranks by a moment."""
        done, self._finished = self._finished, []
        return done

    def close(self) -> None:
        """Waits for what is under way, deletion and the second place included."""
        self.wait()
        self.store.wait()
        if self._copies is not None:
            self._copies.wait()

    def problems(self) -> list[str]:
        """What went wrong with the second place since the last call; training goes on."""
        return self._copies.problems() if self._copies is not None else []

    def _write_all(self, fragments: Fragments, temporary: Path, progress: Progress) -> Path:
        outcome = self._write(fragments, temporary)
        outcomes: list[FileRecord | CheckpointError | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(outcomes, outcome, group=self._group)
        return on_rank_zero(lambda: self._publish(temporary, outcomes, progress), self._group)

    def _write(self, fragments: Fragments, temporary: Path) -> FileRecord | CheckpointError:
        name = f"rank_{torch.distributed.get_rank():05d}.safetensors"
        try:
            return write_fragments(temporary / name, fragments)
        except CheckpointError as error:
            return error

    def _publish(
        self, temporary: Path, outcomes: list[FileRecord | CheckpointError | None], progress: Progress
    ) -> Path:
        failures = [outcome for outcome in outcomes if isinstance(outcome, CheckpointError)]
        if failures:
            self.store.discard(temporary)
            raise failures[0]
        records = [outcome for outcome in outcomes if isinstance(outcome, FileRecord)]
        path = self.store.publish(progress.step, temporary, records, self._metadata(progress))
        self.store.prune()
        if self._copies is not None:
            self._copies.start(path, self.store)
        return path

    def _metadata(self, progress: Progress) -> dict[str, Any]:
        return {
            "progress": vars(progress),
            "config": self.config.model_dump(mode="json"),
            "code_version": code_version(),
        }


def _second_level(config: RunConfig) -> BackgroundCopies | None:
    place = config.checkpoint.copy_to
    return BackgroundCopies(SecondLevel(f"{place.rstrip('/')}/{config.run.name}")) if place else None


def progress_of(checkpoint: LoadedCheckpoint) -> Progress:
    """Where the run stood when the checkpoint was written.

    Raises:
        CheckpointError: it holds imported weights only.
    """
    if "progress" not in checkpoint.metadata:
        raise CheckpointError(
            f"{checkpoint.path} holds imported weights without an optimizer's state, so no run can go on from it; "
            "choose another run.name, and give these weights as run.initial_weights"
        )
    recorded = checkpoint.metadata["progress"]
    tuples = {name: tuple(recorded.get(name, ())) for name in ("left_out", "recent_losses")}
    bad_shards = tuple(BadShard(*shard) for shard in recorded.get("bad_shards", ()))
    return Progress(**{**recorded, **tuples, "bad_shards": bad_shards})


def code_version() -> str:
    """The commit of this repository, with `+changes` if files differ from it; `unknown` outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    try:
        return subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty=+changes"],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
