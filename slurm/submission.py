"""Submits runs to Slurm through Submitit: one job, or one job array for several runs of the same size."""

import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit

from parallel.errors import ConfigurationError
from slurm.job_state import adapt_submitit
from slurm.known_jobs import record_job
from slurm.site import SiteSettings, read_site
from slurm.training_job import TrainingJob
from train.config import RunConfig
from train.run_directory import RunDirectory

ROOT = Path(__file__).resolve().parent.parent
# Submitit counts a signal as a timeout of the job, and ends one that had so many; progress is capped by slurm.requeue.
MANY_TIMEOUTS = 1_000_000
# Of another job, which this command may be part of.
FOREIGN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Shape:
    """Nodes of a job, and on each the processes, each with a GPU if there are any."""

    nodes: int
    tasks_per_node: int
    has_gpus: bool


def shape_of(config: RunConfig, site: SiteSettings) -> Shape:
    """How a run's processes spread over nodes.

    Raises:
        ConfigurationError: they cannot spread evenly.
    """
    processes, gpus = config.parallel.world_size, site.gpus_per_node or 0
    tasks, name = site.tasks_per_node or gpus, "SITE_TASKS_PER_NODE" if site.tasks_per_node else "SITE_GPUS_PER_NODE"
    if gpus and tasks > gpus:
        raise ConfigurationError(f"SITE_TASKS_PER_NODE={tasks} is more than SITE_GPUS_PER_NODE={gpus}; lower it")
    fewest = min(tasks, processes) if tasks else (site.nodes or 1)
    if processes % fewest:
        divisor = f"{name}={tasks}" if tasks else f"SITE_NODES={site.nodes}"
        raise ConfigurationError(
            f"the layout's {processes} processes do not spread evenly with {divisor}; change parallel.data, "
            f"parallel.tensor or parallel.pipeline, or {divisor.partition('=')[0]}"
        )
    tasks_per_node = fewest if tasks else processes // fewest
    return Shape(processes // tasks_per_node, tasks_per_node, gpus > 0)


def submit(
    jobs: Sequence[TrainingJob], name: str, at_once: int | None = None, after: str | None = None
) -> list[submitit.Job[Any]]:
    """Submits runs, several as one array; their job files and logs go to the folder of the first.

    Args:
        jobs: the runs, all with the same number of processes.
        name: the job's name in the queue.
        at_once: how many of an array run at the same time; default: all.
        after: id of a job that must complete first.

    Returns:
        Submitit's jobs, in the same order.

    Raises:
        ConfigurationError: there is no Slurm, it refuses the job, or the values of the site do not fit.
    """
    for program in ("sbatch", "srun", "scontrol"):
        if shutil.which(program) is None:
            raise ConfigurationError(
                f"--launcher slurm needs {program}, which is not on PATH; use a login node of the cluster, or "
                "--launcher local"
            )
    site = read_site(os.environ)
    parameters = _parameters(jobs, name, site)
    if after:
        parameters["additional_parameters"] |= {"dependency": f"afterok:{after}", "kill-on-invalid-dep": "yes"}
    if at_once:
        parameters["array_parallelism"] = at_once
    adapt_submitit()
    with _fresh_folder(RunDirectory(jobs[0].config)) as folder, _own_environment():
        executor = submitit.SlurmExecutor(folder, max_num_timeout=MANY_TIMEOUTS, python=_python_in_job(site))
        executor.update_parameters(**parameters)
        submitted = executor.submit_array(jobs)
    for job, of_run in zip(submitted, jobs, strict=True):
        record_job(of_run.config.directory, job.job_id, folder)
    return submitted


def _parameters(jobs: Sequence[TrainingJob], name: str, site: SiteSettings) -> dict[str, Any]:
    config = jobs[0].config
    shape = shape_of(config, site)
    margin = max(job.config.stability.stop_before_end_seconds for job in jobs)
    if site.minutes * 60 <= margin:
        raise ConfigurationError(
            f"SITE_TIME={site.time} leaves no time to train: the run stops stability.stop_before_end_seconds="
            f"{margin:g} before the end; raise the one or lower the other"
        )
    whole_node = {"mem": 0} if shape.has_gpus and shape.tasks_per_node == site.gpus_per_node else {}
    cores = [f"--cpus-per-task={site.cpus_per_task}"] if site.cpus_per_task else []
    optional = {
        "cpus_per_task": site.cpus_per_task,
        "gpus_per_node": shape.tasks_per_node if shape.has_gpus else None,
        "account": site.account,
        "partition": site.partition,
        "qos": site.qos,
    }
    return {
        "job_name": name,
        "nodes": shape.nodes,
        "ntasks_per_node": shape.tasks_per_node,
        "time": site.minutes,
        "stderr_to_stdout": True,
        "signal_delay_s": max(1, int(margin)),
        "setup": _setup([job.config for job in jobs], site),
        "srun_args": ["--kill-on-bad-exit=1", "--open-mode=append", *cores, *_container(site)],
        "additional_parameters": {"requeue": True, **whole_node},
        **{key: value for key, value in optional.items() if value is not None},
    }


def _python_in_job(site: SiteSettings) -> str:
    if site.venv is None:
        return shlex.quote(sys.executable)
    python = ROOT / site.venv / "bin" / "python"
    if site.container is None and not os.access(python, os.X_OK):
        raise ConfigurationError(f"SITE_VENV={site.venv} holds no Python environment; create it with: make install")
    return shlex.quote(str(python))


def _container(site: SiteSettings) -> list[str]:
    if site.container is None:
        return []
    mounts = ",".join(filter(None, (f"{ROOT}:{ROOT}", site.container_mounts)))
    return [f"--container-image={site.container}", f"--container-workdir={ROOT}", f"--container-mounts={mounts}"]


def _setup(configs: Sequence[RunConfig], site: SiteSettings) -> list[str]:
    """Lines of the batch script before the processes start.

    Slurm itself puts a job back after a preemption or a node's failure, but not after a status other than 0. The shell
    must outlive a signal that is sent to it, too. A restart waits until the processes before it have left the run.
    """
    # Slurm's commands, which the decision needs, are not in a container.
    python = "python3" if site.container else _python_in_job(site)
    setup = [f"source {shlex.quote(str(ROOT / site.setup))} || exit 2"] if site.setup else []
    return [
        f"runs=({' '.join(shlex.quote(str(config.directory.absolute())) for config in configs)})",
        'run="${runs[${SLURM_ARRAY_TASK_ID:-0}]}"',
        f"cd {shlex.quote(str(ROOT))}",
        'export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1',
        "trap : USR1 USR2 TERM",
        f"trap 'status=$?; ((status == 0)) || {python} -m slurm.requeue \"$run\" $status; exit $status' EXIT",
        *setup,
        '((${SLURM_RESTART_COUNT:-0} == 0)) || flock --shared --timeout 300 "$run/.lock" true || exit 1',
        f'MASTER_PORT="$({python} -m slurm.rendezvous_port)"',
        "export MASTER_PORT",
    ]


@contextmanager
def _fresh_folder(directory: RunDirectory) -> Iterator[Path]:
    """A folder for one submission's files, because job ids may come again; nothing of it is left if that fails.

    Raises:
        ConfigurationError: it cannot be made, or Slurm refuses the job.
    """
    missing = [path for path in (directory.submitit, *directory.submitit.parents) if not path.exists()]
    folder = directory.new_attempt()
    try:
        yield folder
    except BaseException as error:
        shutil.rmtree(missing[-1] if missing else folder, ignore_errors=True)
        if isinstance(error, submitit.core.utils.FailedJobError):
            lines = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in str(error).splitlines()]
            reason = "; ".join(filter(None, lines))
            raise ConfigurationError(f"Slurm refused the job: {reason}; see the SITE_ values") from None
        raise


@contextmanager
def _own_environment() -> Iterator[None]:
    """Hides what describes another job, because sbatch passes the environment on."""
    inside = "SLURM_JOB_ID" in os.environ
    hidden = [
        name
        for name in os.environ
        if name in FOREIGN_VARIABLES or (inside and name.startswith("SLURM_") and name != "SLURM_CONF")
    ]
    kept = {name: os.environ.pop(name) for name in hidden}
    try:
        yield
    finally:
        os.environ.update(kept)
