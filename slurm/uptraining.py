"""Runs an uptraining: for each block length, prepares the initial weights once and launches the run."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

from checkpoints.store import CheckpointStore
from checkpoints.uptraining.initial_weights import UptrainingOptions
from slurm.identity import identity_from_environment
from slurm.launch import Launcher, launch
from train.config import RunConfig
from train.run_directory import RunDirectory
from train.uptraining import FOLDER, RECORD, prepare_initial_weights

POLL_SECONDS = 1.0


def launch_uptraining(runs: Sequence[RunConfig], vanilla: Path, options: UptrainingOptions, launcher: Launcher) -> int:
    """Runs an uptraining to its end; the same call goes on where an interrupted one stopped.

    Args:
        runs: see train.uptraining.uptraining_runs.
        vanilla: where the vanilla weights are.
        options: how they are used.
        launcher: see slurm.launch.launch.

    Returns:
        Exit status of the first run that did not complete, else 0; see slurm.launch.launch.

    Raises:
        CheckpointError: weights cannot be read, do not fit or cannot be written.
        ConfigurationError: a run cannot be started.
        DataError: its data cannot be read.
    """
    for number, config in enumerate(runs):
        directory = RunDirectory(config)
        directory.check()
        is_new = not CheckpointStore(directory.checkpoints).complete_steps()
        if is_new or (directory.path / FOLDER).is_dir():  # weights that are there must have been made alike
            _prepare(runs, number, vanilla, options)
        status = launch(config, launcher)
        if status:
            return status
    return 0


def _prepare(runs: Sequence[RunConfig], number: int, vanilla: Path, options: UptrainingOptions) -> None:
    """Makes the initial weights in one process of a job; the others wait for them."""
    identity = identity_from_environment(os.environ)
    if identity is None or identity.rank == 0:
        prepare_initial_weights(runs, number, vanilla, options, lambda line: print(line, flush=True))
        return
    # If rank 0 fails, torchrun and srun end the others.
    while not (runs[number].directory / FOLDER / RECORD).is_file():
        time.sleep(POLL_SECONDS)
