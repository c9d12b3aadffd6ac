"""Tells a person about submitted jobs: what they are, and if asked how they get on until they have ended."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slurm.job_state import JobState, job_states
from train.config import RunConfig

POLL_SECONDS = 2.0


def announce(jobs: Sequence[Any], configs: Sequence[RunConfig]) -> None:
    """Says what has been submitted, where its logs are, and how to watch and end it."""
    for job, config in zip(jobs, configs, strict=True):
        print(f"submitted run {config.run.name} as job {job.job_id}; log: {job.task(0).paths.stdout}")
    folders = " ".join(str(config.directory) for config in configs)
    ids = " ".join(dict.fromkeys(job.job_id.partition("_")[0] for job in jobs))
    print(f"watch: python tools/status.py {folders}\nend: scancel {ids}", flush=True)


def follow(jobs: Sequence[Any]) -> int:
    """Waits until all jobs have ended for good, over their restarts.

    Args:
        jobs: Submitit's jobs; the log of rank 0 is copied if there is just one.

    Returns:
        The first exit status other than 0, else 0.
    """
    log = _Log(jobs[0].task(0).paths.stdout) if len(jobs) == 1 else None
    ids = [job.job_id for job in jobs]
    told: dict[str, str] = {}
    while True:
        states = job_states(ids)
        if log is not None:
            log.copy()
        for job, state in states.items():
            if state is not None and told.get(job) != (now := _in_words(state)):
                told[job] = now
                print(f"job {job}: {now}", file=sys.stderr, flush=True)
        ended = [state for state in states.values() if state is not None and state.has_ended]
        if len(ended) == len(ids):
            return next((status for state in ended if (status := _status(state))), 0)
        time.sleep(POLL_SECONDS)


def _in_words(state: JobState) -> str:
    return f"{state.state} ({state.reason})" if state.reason else state.state


def _status(state: JobState) -> int:
    return state.exit_status or int(state.state not in ("COMPLETED", "FORGOTTEN"))


class _Log:
    """A file that may not exist yet, and grows."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0

    def copy(self) -> None:
        """Prints what has been added since the last time."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._position)
                text = file.read()
        except FileNotFoundError:
            return
        self._position += len(text)
        sys.stdout.buffer.write(text)
        sys.stdout.buffer.flush()
