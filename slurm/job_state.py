"""What Slurm knows of a job, with accounting or without.

Submitit 1.5.4 asks `sacct` alone. Where Slurm keeps no accounts that always fails; Submitit then holds every job for
unknown, and waits for one that failed for ever. So the controller is asked first (`scontrol`, which also knows jobs
that ended some minutes ago), and `sacct` only for what it no longer knows. tests/slurm/test_job_state.py fails when
Submitit does this by itself.
"""

import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import submitit
from submitit.slurm.slurm import SlurmInfoWatcher

COMMAND_SECONDS = 60.0
FORGOTTEN = "FORGOTTEN"
ENDED = frozenset(
    {
        *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"),
        *("REVOKED", FORGOTTEN),
    }
)


@dataclass(frozen=True)
class JobState:
    """A job, or one task of a job array, at this moment.

    Attributes:
        state: Slurm's word, such as PENDING or RUNNING; FORGOTTEN if neither the controller nor accounting knows it.
        reason: why it waits; empty if it does not.
        exit_status: of the batch script, as a shell gives it: 128 and the number of the signal that ended it.
        nodes: Slurm's list of them, such as `gpu[1-2]`.
        restarts: how often it was put back into the queue; None if that is not known.
    """

    state: str
    reason: str = ""
    exit_status: int = 0
    nodes: str = ""
    restarts: int | None = None

    @property
    def has_ended(self) -> bool:
        """Whether it will not run again by itself."""
        return self.state in ENDED


def job_states(jobs: Sequence[str]) -> dict[str, JobState | None]:
    """The states of jobs; None where Slurm does not answer now.

    Args:
        jobs: ids such as `12`, or `12_0` for a task of an array.
    """
    found: dict[str, JobState | None] = {}
    for job in {job.partition("_")[0] for job in jobs}:
        known = _ask_controller(job)
        if known is not None:
            known = {**_ask_accounting(job), **known} if not known.keys() >= _of(job, jobs) else known
            found |= {name: known.get(name, JobState(FORGOTTEN)) for name in _of(job, jobs)}
    return {job: found.get(job) for job in jobs}


def _of(job: str, names: Sequence[str]) -> set[str]:
    """Those of the names that are of this job or its tasks."""
    return {name for name in names if name.partition("_")[0] == job}


def _ask_controller(job: str) -> dict[str, JobState] | None:
    """What is known under a job's id, by that id, and for an array by that of each task; None without an answer."""
    answer = _run("scontrol", "--oneliner", "show", "job", job)
    if answer is None or (answer.returncode and "Invalid job id" not in answer.stderr):
        return None
    states: dict[str, JobState] = {}
    for line in answer.stdout.splitlines():
        fields = dict(pair.split("=", 1) for pair in line.split() if "=" in pair)
        if "JobState" in fields:
            state = _from_controller(fields)
            tasks = _task_numbers(fields.get("ArrayTaskId", ""))
            states |= {f"{fields['ArrayJobId']}_{task}": state for task in tasks}
            states[fields["JobId"]] = state
    return states


def _from_controller(fields: dict[str, str]) -> JobState:
    reason, nodes = fields.get("Reason", ""), fields.get("NodeList", "")
    return JobState(
        state=fields["JobState"],
        reason="" if reason == "None" else reason,
        exit_status=_exit_status(fields.get("ExitCode", "0:0")),
        nodes="" if nodes == "(null)" else nodes,
        restarts=int(fields.get("Restarts", 0)),
    )


def _ask_accounting(job: str) -> dict[str, JobState]:
    """What accounting knows of a job."""
    columns = "--format=JobID,State,ExitCode,NodeList"
    answer = _run("sacct", "--noheader", "--parsable2", "--allocations", columns, "--jobs", job)
    if answer is None or answer.returncode:
        return {}
    states = {}
    for line in answer.stdout.splitlines():
        name, state, exit_code, nodes = line.split("|")
        states[name] = JobState(state.split()[0], exit_status=_exit_status(exit_code), nodes=nodes)
    return states


def _run(*command: str) -> subprocess.CompletedProcess[str] | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False)
    except (OSError, subprocess.SubprocessError):
        return None


def _exit_status(code: str) -> int:
    """From Slurm's STATUS:SIGNAL."""
    status, _, number = code.partition(":")
    return 128 + int(number) if number not in ("", "0") else int(status)


def _task_numbers(text: str) -> Iterator[int]:
    """The tasks in an array's description, such as `0,3-7%2` (two at a time)."""
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", text.partition("%")[0]):
        yield from range(int(first), int(last or first) + 1)


class _Watcher(SlurmInfoWatcher):
    """Submitit's memory of jobs, filled from here."""

    def update(self) -> None:
        """Asks for all jobs that have not ended."""
        for job, state in job_states(sorted(self._registered - self._finished)).items():
            if state is not None:
                self._info_dict[job] = {"JobID": job, "State": state.state, "NodeList": state.nodes}
        self._last_status_check = time.time()
        self._finished |= {job for job in self._registered if self.is_done(job, mode="cache")}


def adapt_submitit() -> Any:
    """Makes Submitit's jobs learn their states from here; returns its class of jobs."""
    job_class = submitit.SlurmJob
    if not isinstance(job_class.watcher, _Watcher):
        job_class.watcher = _Watcher(delay_s=30)
    return job_class
