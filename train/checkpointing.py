"""Saves and restores a run together with the other ranks."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed

from checkpoints.engine_state import engine_fragments
from checkpoints.errors import CheckpointError
from checkpoints.fragments import write_fragments
from checkpoints.records import FileRecord
from checkpoints.store import CheckpointStore, LoadedCheckpoint
from train.config import RunConfig
from train.rank_zero import on_rank_zero


@dataclass(frozen=True)
class Progress:
    """Where a run stands; with the weights and moments, all there is to restore.

    Nothing is drawn at random after initialization (no dropout; the data order is a function of the position), so there
    is no generator state to keep.

    Attributes:
        step: steps done.
        optimizer_steps: updates done; fewer than step if a batch had no valid target.
        consumed_sequences: position in the stream of sequences.
        stream: fingerprint of that stream.
    """

    step: int
    optimizer_steps: int
    consumed_sequences: int
    stream: str


class RunCheckpoints:
    """The checkpoints of a run; every method is called by all ranks together."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.config = config
        self.store = CheckpointStore(folder, config.checkpoint.keep_last, config.checkpoint.keep_every)

    def newest(self) -> LoadedCheckpoint | None:
        """The newest intact checkpoint, found and verified by rank 0.

        Raises:
            CheckpointError: there are checkpoints, but none is intact.
        """
        return on_rank_zero(self.store.newest)

    def save(self, engine: Any, progress: Progress) -> Path:
        """Writes a checkpoint; it becomes visible when all ranks have written their part.

        Raises:
            CheckpointError: on all ranks, if any failed; older checkpoints are untouched.
        """
        temporary = on_rank_zero(lambda: self.store.begin(progress.step))
        outcome = self._write(engine, temporary)
        outcomes: list[FileRecord | CheckpointError | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(outcomes, outcome)
        return on_rank_zero(lambda: self._publish(temporary, outcomes, progress))

    def _write(self, engine: Any, temporary: Path) -> FileRecord | CheckpointError:
        name = f"rank_{torch.distributed.get_rank():05d}.safetensors"
        try:
            return write_fragments(temporary / name, engine_fragments(engine))
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
        return path

    def _metadata(self, progress: Progress) -> dict[str, Any]:
        return {
            "progress": vars(progress),
            "config": self.config.model_dump(mode="json"),
            "code_version": code_version(),
        }


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
    return Progress(**checkpoint.metadata["progress"])


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
