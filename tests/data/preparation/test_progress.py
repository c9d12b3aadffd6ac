import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from data.preparation import progress
from data.preparation.duplicates import HashFile, find_kept
from data.preparation.intermediate import HASHES
from data.preparation.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_in_a_log(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The second line comes with the update after the interval."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Progress("tokenizing", "B", total=4_000_000, done=1_000_000) as shown:
        for _ in range(3):
            now[0] += 20
            shown.update(500_000, 100_000)
    assert capsys.readouterr().err == "tokenizing: 50.0% of 4,000,000 B, 5,000 tokens/s, 0:01:20 left\n"


def test_no_rate_where_no_tokens_are_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """As in the search for duplicates."""
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: 100.0)
    np.save(tmp_path / "a.npy", np.zeros(3, HASHES))
    find_kept([HashFile(tmp_path / "a.npy", 3)], tmp_path / "kept.npy", 1, partition_documents=2)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "finding duplicates: 50.0% of 2 parts, 0:00:00 left"
    assert len(lines) == 2


def test_a_bar_on_a_terminal_and_nothing_if_unwanted(monkeypatch: pytest.MonkeyPatch) -> None:
    for shown, pattern in ((True, r"shuffling.*100%.*2\.00k/2\.00k.*tokens/s"), (False, r"\A\Z")):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        with Progress("shuffling", "token", total=2000, shown=shown) as bar:
            bar.update(2000, 2000)
        assert re.search(pattern, terminal.getvalue().rpartition("\r")[2])
