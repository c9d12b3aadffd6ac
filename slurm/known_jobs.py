"""Which of Slurm's jobs are of a run: noted in its folder at submission, and by each attempt."""

import json
import time
from contextlib import suppress
from pathlib import Path

from checkpoints.files import write_durably
from parallel.errors import ConfigurationError
from slurm.job_state import JobState, job_states
from train.attempts import read_attempts
from train.run_directory import RunDirectory

RECORD = "submission.json"


def record_job(run: Path, job: str, logs: Path) -> None:
    """Notes the newest job of a run and where its logs are."""
    run.mkdir(parents=True, exist_ok=True)
    write_durably(run / RECORD, json.dumps({"job": job, "logs": str(logs), "time": time.time()}) + "\n")


def known_jobs(run: Path) -> list[str]:
    """Ids of a run's newest jobs: the one submitted from Python, and that of the newest attempt."""
    jobs = [attempt.job for attempt in read_attempts(run)[-1:] if attempt.job]
    with suppress(OSError, ValueError, KeyError):
        jobs.insert(0, str(json.loads((run / RECORD).read_text(encoding="utf-8"))["job"]))
    return list(dict.fromkeys(jobs))


def job_in_slurm(run: Path) -> tuple[str, JobState] | None:
    """A job of the run that waits or runs now, and its state; None if there is none, or no Slurm."""
    for job, state in job_states(known_jobs(run)).items():
        if state is not None and not state.has_ended:
            return job, state
    return None


def check_not_in_slurm(directory: RunDirectory) -> None:
    """Checks that no job of this run waits or runs; one outside Slurm is met by the run's lock.

    Raises:
        ConfigurationError: there is one.
    """
    found = job_in_slurm(directory.path)
    if found is not None:
        job, state = found
        raise ConfigurationError(
            f"run {directory.config.run.name} is in Slurm already, as job {job} ({state.state}); end that with "
            f"scancel {job}, or choose another run.name"
        )
