"""How a tool is run in a test, and what its end must look like."""

import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Outcome:
    """How a run of a script in this process ended."""

    status: int
    output: str
    errors: list[str]


class Script:
    """A tool that is run in this process: importing torch anew takes seconds."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._path = path
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *arguments: object) -> Outcome:
        self._monkeypatch.setattr(sys, "argv", [str(self._path), *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(self._path), run_name="__main__")
        captured = self._capsys.readouterr()
        return Outcome(int(ended.value.code or 0), captured.out, captured.err.splitlines())


def assert_one_clear_error(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Status 2 and one line for the user, which holds every part."""
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    for part in parts:
        assert part in errors[0], errors[0]
