"""Puts a job back into the queue after its run stopped or failed, as long as the run gets on.

    python -m slurm.requeue RUN_FOLDER STATUS

Slurm itself does so after a preemption or a failed node, but not after a status other than 0. Imports nothing heavy.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from slurm.identity import job_id
from train.process import STOPPED_STATUS, USER_ERROR_STATUS

MAXIMUM_WITHOUT_PROGRESS = 3
FILE = "requeues.jsonl"
STEP_FOLDER = re.compile(r"step_(\d+)")


def newest_step(run: Path) -> int:
    """The newest checkpoint's step by its folder's name; 0 without any."""
    folders = (run / "checkpoints").glob("step_*")
    return max((int(match[1]) for path in folders if (match := STEP_FOLDER.fullmatch(path.name))), default=0)


def decide(run: Path, status: int, job: str) -> tuple[bool, str]:
    """Whether to put the job back, and why or why not."""
    if status == 0:
        return False, "the run ended"
    if status == USER_ERROR_STATUS:
        return False, "the run ended with an error that a restart would meet again; its log names it"
    step = newest_step(run)
    stuck = _without_progress(run, step, job)
    if stuck >= MAXIMUM_WITHOUT_PROGRESS:
        return False, (
            f"{stuck} restarts in a row made no checkpoint after step {step}, and the last ended with status {status}; "
            f"look at the logs, and submit again: that starts from step {step}"
        )
    cause = "it was stopped" if status == STOPPED_STATUS else f"it failed with status {status}"
    return True, f"{cause} at step {step}"


def _without_progress(run: Path, step: int, job: str) -> int:
    """How many of the newest restarts of this job began at this step; a new submission may try again."""
    count = 0
    for line in reversed(_recorded(run)):
        if (line["step"], line["job"]) != (step, job):
            break
        count += 1
    return count


def _recorded(run: Path) -> list[dict[str, Any]]:
    try:
        lines = (run / FILE).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except ValueError:  # torn by a crash
            continue
    return records


def requeue(run: Path, status: int, job: str) -> str:
    """Puts the job back if that makes sense, and notes it.

    Returns:
        What came of it. Why the job is put back is printed before, because Slurm then ends this process.
    """
    again, reason = decide(run, status, job)
    if not again:
        return f"not put back into the queue: {reason}"
    state = subprocess.run(
        ["squeue", "--noheader", f"--jobs={job}", "--format=%T"], capture_output=True, text=True, check=False
    ).stdout.split()
    if "RUNNING" not in state:
        return "not put back into the queue: the job was cancelled"
    try:
        _note(run, status, job)
    except OSError as error:
        return f"not put back into the queue: {run / FILE}, which counts restarts, cannot be written: {error.strerror}"
    print(f"requeue: put back into the queue: {reason}", flush=True)  # before Slurm ends this process
    answer = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    return f"Slurm refuses to put it back: {answer.stderr.strip()}" if answer.returncode else "done"


def _note(run: Path, status: int, job: str) -> None:
    run.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"time": time.time(), "job": job, "status": status, "step": newest_step(run)})
    with (run / FILE).open("a+b") as file:
        file.seek(0)
        is_torn = not (b"\n" + file.read()).endswith(b"\n")  # by a crash
        file.write(b"\n" * is_torn + line.encode() + b"\n")


def main() -> None:
    """Decides for the job of this process."""
    run, status = Path(sys.argv[1]), int(sys.argv[2])
    print(f"requeue: {requeue(run, status, job_id(os.environ))}", flush=True)


if __name__ == "__main__":
    main()
