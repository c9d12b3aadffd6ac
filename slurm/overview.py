"""Where runs stand, by their folders and by Slurm."""

from dataclasses import replace
from pathlib import Path

from parallel.errors import ConfigurationError
from slurm.job_state import JobState, job_states
from slurm.known_jobs import RECORD, known_jobs
from train.status import RunStatus, describe, read_status

CONFIG_FILE = "config.yaml"


def runs_in(folder: Path) -> list[Path]:
    """The folder itself if it is a run's, else the runs in it.

    Raises:
        ConfigurationError: there are none.
    """
    if _is_run(folder):
        return [folder]
    runs = [path for path in sorted(folder.iterdir()) if _is_run(path)] if folder.is_dir() else []
    if not runs:
        what = "holds no run" if folder.is_dir() else "does not exist"
        raise ConfigurationError(
            f"{folder} {what}; give the folder of a run, such as runs/NAME, or of several, as runs"
        )
    return runs


def _is_run(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file() or (folder / RECORD).is_file()


def overview(run: Path) -> str:
    """What is known of a run, in a few lines.

    Raises:
        ConfigurationError: its configuration cannot be read.
    """
    job, state = _newest_job(run)
    in_words = "" if state is None else f"  job {job} in Slurm: {_in_words(state)}"
    if not (run / CONFIG_FILE).is_file():  # submitted, but no process has begun
        return f"{run.name}: not started\n{in_words or f'  job {job}: Slurm cannot be asked'}"
    status = read_status(run)
    if state is not None:
        status = _corrected(status, state)
    return "\n".join(filter(None, (describe(status), in_words)))


def _newest_job(run: Path) -> tuple[str, JobState | None]:
    """A job that waits or runs, else the newest one."""
    states = job_states(known_jobs(run))
    jobs: list[tuple[str, JobState | None]] = list(states.items()) or [("", None)]
    return next(((job, state) for job, state in jobs if state is not None and not state.has_ended), jobs[0])


def _corrected(status: RunStatus, job: JobState) -> RunStatus:
    """The status, where Slurm knows better than the run's folder."""
    if status.state == "complete":
        return status
    if job.state == "PENDING":
        return replace(status, state="waiting in Slurm's queue")
    if job.has_ended:
        is_of_slurm = bool(status.attempts) and status.attempts[-1].job is not None
        return replace(status, state="stopped") if is_of_slurm else status
    has_begun = bool(status.attempts) and status.attempts[-1].ended is None
    return status if has_begun else replace(status, state="starting")


def _in_words(job: JobState) -> str:
    reason = f" ({job.reason})" if job.reason else ""
    nodes = f" on {job.nodes}" if job.nodes else ""
    restarts = f", restarts: {job.restarts}" if job.restarts else ""
    return f"{job.state}{reason}{nodes}{restarts}"
