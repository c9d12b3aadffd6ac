"""The history of a run: a line per start, first step and end of each attempt, in `runs/NAME/attempts.jsonl`.

Its configuration is kept as `attempts/NUMBER.yaml`.

An attempt without an end was killed, or its machine failed. Lines are only ever appended; a torn last line is ignored.
"""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from train.config import RunConfig
from train.config_file import config_text

FILE = "attempts.jsonl"
CONFIGS = "attempts"
UNKNOWN_END = "it ended without a word: killed, or its machine failed"


@dataclass(frozen=True)
class Attempt:
    """One start of a run.

    Attributes:
        number: from 1.
        started: Unix time.
        host: machine of rank 0.
        step: where it began.
        layout: `tensor 1 x pipeline 1 x data 2, ZeRO 1`.
        code_version: commit.
        startup: seconds of each phase until the first step was done; empty if it was not.
        job: the scheduler's id, if any.
        ended: Unix time, if it said so.
        end_step: where it ended.
        reason: why it ended.
    """

    number: int
    started: float
    host: str
    step: int
    layout: str
    code_version: str
    startup: dict[str, float] = field(default_factory=dict)
    job: str | None = None
    ended: float | None = None
    end_step: int | None = None
    reason: str | None = None


def read_attempts(folder: Path) -> list[Attempt]:
    """All attempts of a run, oldest first."""
    attempts: dict[int, dict[str, Any]] = {}
    for line in _lines(folder / FILE):
        attempts.setdefault(line["number"], {}).update(line)
    # A full disk may have swallowed an attempt's first line.
    return [Attempt(**values) for _, values in sorted(attempts.items()) if "started" in values]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return
    for line in text.splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue


class AttemptRecord:
    """Writes the lines of the attempt that is under way, and its configuration beside them; on rank 0 only.

    Args:
        config: the run.
        step: where the attempt begins.
        code_version: commit.
    """

    def __init__(self, config: RunConfig, step: int, code_version: str) -> None:
        folder = config.directory
        self._path = folder / FILE
        self._has_ended = False
        self._number = max((line["number"] for line in _lines(self._path)), default=0) + 1
        with suppress(OSError):
            (folder / CONFIGS).mkdir(exist_ok=True)
            (folder / CONFIGS / f"{self._number:04d}.yaml").write_text(config_text(config), encoding="utf-8")
        attempt = Attempt(
            number=self._number,
            started=time.time(),
            host=socket.gethostname(),
            job=os.environ.get("SLURM_JOB_ID"),
            step=step,
            layout=str(config.parallel),
            code_version=code_version,
        )
        self._append({name: value for name, value in asdict(attempt).items() if value is not None})

    def first_step_done(self, startup: dict[str, float]) -> None:
        """Notes the time to the first step."""
        self._append({"number": self._number, "startup": {name: round(value, 3) for name, value in startup.items()}})

    def end(self, step: int, reason: str) -> None:
        """Notes how the attempt ended; the first reason counts, what follows from it does not."""
        if self._has_ended:
            return
        self._has_ended = True
        self._append({"number": self._number, "ended": time.time(), "end_step": step, "reason": reason})

    def _append(self, line: dict[str, Any]) -> None:
        with suppress(OSError), self._path.open("a+", encoding="utf-8") as file:  # the history is not worth a run
            file.seek(0)
            is_torn = not ("\n" + file.read()).endswith("\n")
            file.write("\n" * is_torn + json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
