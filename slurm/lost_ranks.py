"""Ends a job on this machine of which a rank has gone without a word.

In the middle of training the others notice that themselves; until all have met, they would wait for half an hour.
"""

import time
from contextlib import suppress
from typing import Any

import psutil

LOOK_SECONDS = 1.0
GRACE_SECONDS = 20.0


class LostRanks:
    """Watches the processes of a job of Submitit's local executor.

    Attributes:
        found: ranks that had gone when the others were killed.
    """

    def __init__(self, job: Any) -> None:
        self.found: set[int] = set()
        self._job = job
        self._looked = 0.0
        self._silent_since: float | None = None

    def look(self) -> None:
        """Kills the others once a rank has been gone for a while; to be called again and again."""
        now = time.monotonic()
        if self.found or now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        running = self._running()
        silent = {rank for rank in range(self._job.num_tasks) if rank not in running and not self._has_result(rank)}
        if not running or not silent:
            self._silent_since = None
        elif self._silent_since is None:
            self._silent_since = now
        elif now - self._silent_since > GRACE_SECONDS:
            self.found = silent
            for process in running.values():
                with suppress(psutil.NoSuchProcess):
                    process.kill()

    def _running(self) -> dict[int, psutil.Process]:
        """The processes of ranks, which are children of Submitit's controller."""
        found = {}
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self._job._process.pid).children():
                with suppress(psutil.Error, KeyError):  # it has just ended, or just begun
                    found[int(process.environ()["SUBMITIT_LOCAL_GLOBALID"])] = process
        return found

    def _has_result(self, rank: int) -> bool:
        exists: bool = self._job.task(rank).paths.result_pickle.exists()
        return exists
