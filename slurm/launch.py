"""Starts training: all processes on this machine, as one rank of a running job, or as a job of Slurm."""

import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import Literal

from checkpoints.store import CheckpointStore
from parallel.errors import ConfigurationError
from slurm.follow import announce, follow
from slurm.identity import identity_from_environment
from slurm.known_jobs import check_not_in_slurm
from slurm.leaving import keep_status
from slurm.local import INTERRUPTED_STATUS, run_local
from slurm.submission import submit
from slurm.task_evaluation import prepare_tasks
from slurm.training_job import TrainingJob
from train.config import RunConfig
from train.process import STOPPED_STATUS, ProcessIdentity
from train.run_directory import RunDirectory
from train.streams import check_data
from train.worker import train_rank

Launcher = Literal["auto", "local", "inline", "slurm"]


def launch(config: RunConfig, launcher: Launcher, wait: bool = False) -> int:
    """Runs a job to its end, or hands it to Slurm.

    Args:
        config: the run.
        launcher: `local` starts all processes here; `inline` makes this process one rank (torchrun, srun); `slurm`
            submits a job; `auto` is `inline` inside a job of torchrun or srun and `local` elsewhere.
        wait: stay until the submitted job has ended.

    Returns:
        Exit status: 0 complete or submitted, 2 a user's mistake, 130 or 143 stopped by a signal, after saving, even if
        the run was just complete, 1 a crash, 137 a killed rank.

    Raises:
        ConfigurationError: the run cannot be started; before any process is.
        DataError: its data or that of its tasks cannot be read; likewise.
    """
    if launcher == "slurm":
        return launch_on_slurm([config], config.run.name, wait)
    identity = identity_from_environment(os.environ)
    if launcher == "inline" and identity is None:
        raise ConfigurationError(
            "--launcher inline needs RANK and WORLD_SIZE (torchrun) or SLURM_PROCID (srun) in the "
            "environment; start it with one of them, or use --launcher local"
        )
    inline = launcher == "inline" or (launcher == "auto" and identity is not None)
    directory = RunDirectory(config)
    if not inline and not is_startable(directory):
        return 0
    if inline:
        directory.check()
        check_data(config)
    if not inline or identity is None:
        return run_local(config, directory)
    return _train_inline(config, identity)


def _train_inline(config: RunConfig, identity: ProcessIdentity) -> int:
    """Is one rank of a job that is there."""
    try:
        result = train_rank(config, identity, partial(prepare_tasks, config))
    except BaseException:
        keep_status()
        raise
    if result.status:
        keep_status()
    if result.error:
        # Every rank says its own: what only one of them met would otherwise stay unsaid.
        print(f"error: rank {identity.rank}: {result.error}", file=sys.stderr)
    return result.status


def launch_sweep(configs: Sequence[RunConfig], launcher: Launcher, name: str, at_once: int | None, wait: bool) -> int:
    """Runs several configurations: as one job array of Slurm, or one after another here.

    Args:
        configs: the runs.
        launcher: `slurm`, or `local` (`auto` means that).
        name: of the job array.
        at_once: how many of the array run at the same time; default: all.
        wait: stay until the submitted jobs have ended.

    Returns:
        The first exit status other than 0; a run that fails does not keep the next from starting, a stop signal does.

    Raises:
        ConfigurationError: a run cannot be started; nothing has been submitted then.
        DataError: likewise.
    """
    if launcher == "slurm":
        return launch_on_slurm(configs, name, wait, at_once)
    if launcher == "inline":
        raise ConfigurationError("--sweep starts its runs itself; use it with --launcher slurm or local, not inline")
    statuses = []
    for config in configs:
        print(f"--- run {config.run.name}", flush=True)
        statuses.append(launch(config, "local"))
        if statuses[-1] in (STOPPED_STATUS, INTERRUPTED_STATUS):
            break
    return next(filter(None, statuses), 0)


def launch_on_slurm(configs: Sequence[RunConfig], name: str, wait: bool, at_once: int | None = None) -> int:
    """Checks runs and submits those that are not complete; see launch and launch_sweep."""
    left = [config for config in configs if is_startable(RunDirectory(config))]
    if not left:
        return 0
    for config in left:
        check_not_in_slurm(RunDirectory(config))
    jobs = submit([TrainingJob(config) for config in left], name, at_once)
    announce(jobs, left)
    return follow(jobs) if wait else 0


def is_startable(directory: RunDirectory) -> bool:
    """Checks a run before any process is started; says so if there is nothing left to do.

    Raises:
        ConfigurationError: its folder holds a run with other settings, or its tasks cannot be run.
        DataError: its data or that of its tasks cannot be read.
    """
    directory.check()
    config = directory.config
    if is_complete(config, directory):
        print(f"run {config.run.name} is complete at step {config.train.last_step}; nothing to do")
        return False
    check_data(config)
    prepare_tasks(config)
    return True


def is_complete(config: RunConfig, directory: RunDirectory) -> bool:
    """Whether the run's newest checkpoint is of its last step, and nothing was interrupted after that."""
    store = CheckpointStore(directory.checkpoints)
    steps = store.complete_steps()
    if not steps or steps[-1] < config.train.last_step:
        return False
    progress = store.at_step(steps[-1], verify=False).metadata.get("progress", {})
    wanted = {"validation_due": bool(config.validation.every), "tasks_due": bool(config.tasks.names)}
    return not any(progress.get(name, False) for name, is_wanted in wanted.items() if is_wanted)
