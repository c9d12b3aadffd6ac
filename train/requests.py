"""What this rank has been asked to do at the next step boundary: by signals, by the job's end, by files.

All ranks then agree on the most urgent request of any of them (train.metrics.agree).
"""

import time
from contextlib import suppress
from enum import IntEnum
from pathlib import Path

from train.stop_signals import StopSignals


class Request(IntEnum):
    """Requests, from the least to the most urgent."""

    NONE = 0
    SAVE = 1  # save now and go on
    STOP = 2  # save and leave; the job is to be put back into the queue
    END = 3  # save and leave for good


class Requests:
    """Watches what may ask this rank for something.

    Args:
        folder: the run's folder; a file `save` there asks for a checkpoint now, a file `stop` for the end of the run.
        signals: handlers, installed since before.
        job_end: Unix time at which the scheduler ends the job, if known.
        margin: seconds before that at which to stop.
        watches_files: whether this rank looks for the files; one is enough.
    """

    def __init__(
        self, folder: Path, signals: StopSignals, job_end: float | None, margin: float, watches_files: bool
    ) -> None:
        self._signals = signals
        self._leave_at = None if job_end is None else job_end - margin
        self._save_file = folder / "save"
        self._stop_file = folder / "stop"
        self._watches_files = watches_files

    def pending(self) -> Request:
        """The most urgent request at this moment."""
        if self._watches_files and self._stop_file.exists():
            return Request.END
        if self._signals.received is not None or (self._leave_at is not None and time.time() >= self._leave_at):
            return Request.STOP
        if self._watches_files and self._save_file.exists():
            return Request.SAVE
        return Request.NONE

    def reason(self, request: Request) -> str:
        """Why there is this request, in words."""
        if self.pending() < request:
            return "another rank was asked to"
        if request is Request.END:
            return f"the file {self._stop_file}"
        if request is Request.SAVE:
            return f"the file {self._save_file}"
        return self._signals.received.name if self._signals.received else "the job's time limit"

    def done(self, request: Request) -> None:
        """Takes the file of a request that has been carried out away, so that it acts once."""
        files = {Request.SAVE: [self._save_file], Request.END: [self._save_file, self._stop_file]}
        if self._watches_files:
            for path in files.get(request, []):
                with suppress(OSError):
                    path.unlink(missing_ok=True)
