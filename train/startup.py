"""Where the time until the first step goes."""

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class JobTimes:
    """What the scheduler says of this job, in Unix seconds; None: not known.

    Attributes:
        submitted: when it was put into the queue, for the last time.
        started: when it got its nodes.
        end: when it will be ended.
    """

    submitted: float | None = None
    started: float | None = None
    end: float | None = None


class StartupClock:
    """Splits the time from the submission to the end of the first step.

    Args:
        job: times of the scheduler's job, if this is one.
    """

    def __init__(self, job: JobTimes = JobTimes()) -> None:
        import psutil  # not where slurm/requeue.py may run: outside a container

        self._last = psutil.Process().create_time()
        self.seconds: dict[str, float] = {}
        if job.submitted is not None and job.started is not None:
            self.seconds["scheduler"] = max(0.0, job.started - job.submitted)
            self.seconds["job_setup"] = max(0.0, self._last - job.started)

    def reached(self, phase: str) -> None:
        """Ends a phase: what went by since the one before is its time."""
        now = time.time()
        self.seconds[phase] = now - self._last
        self._last = now

    def split(self, phase: str, part: str, seconds: float) -> None:
        """Makes a part of the last phase, which took so many seconds of it, a phase of its own before it."""
        rest = self.seconds.pop(phase) - seconds
        self.seconds |= {part: seconds, phase: rest}

    @property
    def total(self) -> float:
        """Seconds of all phases so far."""
        return sum(self.seconds.values())

    def describe(self) -> str:
        """All phases in one line."""
        phases = ", ".join(f"{phase.replace('_', ' ')} {seconds:.1f}" for phase, seconds in self.seconds.items())
        return f"first step {self.total:.1f} s after the start ({phases})"
