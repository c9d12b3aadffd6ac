"""Runs an uptraining: for each block length, prepares the initial weights once and launches the run."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints.store import CheckpointStore
from checkpoints.uptraining.initial_weights import UptrainingOptions
from slurm.follow import announce, follow
from slurm.identity import identity_from_environment
from slurm.known_jobs import check_not_in_slurm
from slurm.launch import Launcher, is_startable, launch
from slurm.submission import submit
from slurm.training_job import TrainingJob
from train.config import RunConfig
from train.run_directory import RunDirectory
from train.uptraining import FOLDER, RECORD, prepare_initial_weights

POLL_SECONDS = 1.0


@dataclass(frozen=True)
class InitialWeights:
    """What makes the initial weights of one run of an uptraining, in one process of a job; the others wait for them.

    Attributes:
        runs: see train.uptraining.uptraining_runs.
        number: of the run among them.
        vanilla: where the vanilla weights are.
        options: how they are used.
    """

    runs: tuple[RunConfig, ...]
    number: int
    vanilla: Path
    options: UptrainingOptions

    def __call__(self) -> None:
        """Makes them unless they are there, or the run is past needing them.

        Raises:
            CheckpointError: weights cannot be read, do not fit or cannot be written.
            ConfigurationError: there are weights already, made in another way.
        """
        directory = RunDirectory(self.runs[self.number])
        is_new = not CheckpointStore(directory.checkpoints).complete_steps()
        if not is_new and not (directory.path / FOLDER).is_dir():  # weights that are there must have been made alike
            return
        identity = identity_from_environment(os.environ)
        if identity is None or identity.rank == 0:
            prepare_initial_weights(
                self.runs, self.number, self.vanilla, self.options, lambda line: print(line, flush=True)
            )
            return
        # If rank 0 fails, torchrun and srun end the others.
        while not (directory.path / FOLDER / RECORD).is_file():
            time.sleep(POLL_SECONDS)


def launch_uptraining(
    runs: Sequence[RunConfig], vanilla: Path, options: UptrainingOptions, launcher: Launcher, wait: bool = False
) -> int:
    """Runs an uptraining to its end; the same call goes on where an interrupted one stopped.

    Args:
        runs: see train.uptraining.uptraining_runs.
        vanilla: where the vanilla weights are.
        options: how they are used.
        launcher: see slurm.launch.launch; `slurm` submits a job for each run, which starts when the one before is
            complete.
        wait: stay until the submitted jobs have ended.

    Returns:
        Exit status of the first run that did not complete, else 0; see slurm.launch.launch.

    Raises:
        CheckpointError: weights cannot be read, do not fit or cannot be written.
        ConfigurationError: a run cannot be started.
        DataError: its data cannot be read.
    """
    weights = [InitialWeights(tuple(runs), number, vanilla, options) for number in range(len(runs))]
    if launcher == "slurm":
        return _submit(weights, wait)
    for config, make_weights in zip(runs, weights, strict=True):
        RunDirectory(config).check()
        make_weights()
        status = launch(config, launcher)
        if status:
            return status
    return 0


def _submit(weights: Sequence[InitialWeights], wait: bool) -> int:
    """One job for each run that is left, so that each has its own count of restarts without progress."""
    left = [TrainingJob(config, one) for one in weights if is_startable(RunDirectory(config := one.runs[one.number]))]
    for job in left:
        check_not_in_slurm(RunDirectory(job.config))
        if job.prepare is not None and (job.config.directory / FOLDER).is_dir():
            job.prepare()  # only checks how the weights there were made
    submitted: list[Any] = []
    for job in left:
        after = submitted[-1].job_id if submitted else None
        submitted += submit([job], job.config.run.name, after=after)
    announce(submitted, [job.config for job in left])
    return follow(submitted) if wait and submitted else 0
