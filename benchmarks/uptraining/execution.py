"""Runs the commands of a study, several at a time; what is finished is skipped, what was interrupted goes on."""

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.uptraining.plan import StudyRun

POLL_SECONDS = 0.5


class StudyError(Exception):
    """A command of the study failed."""


@dataclass
class _Active:
    """A run in progress.

    Attributes:
        run: which one.
        process: its current command.
        waiting: commands that follow.
        partial: what the last command writes; renamed when all is done.
        started: time in seconds.
    """

    run: StudyRun
    process: subprocess.Popen[bytes]
    waiting: list[list[str]]
    partial: Path
    started: float = field(default_factory=time.monotonic)


def run_all(runs: Sequence[StudyRun], jobs: int, say: Callable[[str], None]) -> None:
    """Trains and evaluates every run that has no result yet.

    Args:
        runs: in the order in which they should start.
        jobs: this many at a time.
        say: is told, in a line, what starts and ends.

    Raises:
        StudyError: a command failed; the others have been stopped.
    """
    pending = [run for run in runs if not run.result.is_file()]
    say(f"{len(runs) - len(pending)} of {len(runs)} runs are finished")
    active: list[_Active] = []
    try:
        while pending or active:
            while len(active) < jobs and (run := _next_ready(pending, runs)) is not None:
                pending.remove(run)
                say(f"{run.name} starts")
                active.append(_start(run))
            time.sleep(POLL_SECONDS)
            active = [item for item in active if _advance(item, say)]
    finally:
        _stop(active)


def _next_ready(pending: Sequence[StudyRun], runs: Sequence[StudyRun]) -> StudyRun | None:
    finished = {run.name for run in runs if run.result.is_file()}
    return next((run for run in pending if run.needs is None or run.needs in finished), None)


def _start(run: StudyRun) -> _Active:
    partial = run.result.with_suffix(".partial")
    for folder in (run.log.parent, run.result.parent):
        folder.mkdir(parents=True, exist_ok=True)
    return _Active(run, _command(run.training, run.log), [run.evaluation(partial)], partial)


def _command(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Starts a command with one thread; Ctrl-C reaches it only through `_stop`."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(log, "ab") as output:
        return subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )


def _advance(item: _Active, say: Callable[[str], None]) -> bool:
    """Goes on with a run whose command has ended; returns whether it is still in progress."""
    status = item.process.poll()
    if status is None:
        return True
    if status:
        raise StudyError(f"{item.run.name} failed with status {status}; see {item.run.log}, then start the study again")
    if item.waiting:
        item.process = _command(item.waiting.pop(0), item.run.log)
        return True
    os.replace(item.partial, item.run.result)
    say(f"{item.run.name} is finished after {time.monotonic() - item.started:.0f} s")
    return False


def _stop(active: Sequence[_Active]) -> None:
    """Tells commands in progress to save and leave, and waits for them."""
    for item in active:
        if item.process.poll() is None:
            item.process.terminate()
    for item in active:
        item.process.wait()
