"""tools/status.py on folders of runs, as a user starts it."""

import subprocess
import sys
from pathlib import Path

from slurm.job_state import JobState
from slurm.overview import _corrected
from tests.train.small_run import small_run
from train.attempts import AttemptRecord
from train.config_file import config_text
from train.status import read_status

ROOT = Path(__file__).resolve().parents[2]


def make_run(root: Path, name: str) -> Path:
    config = small_run(root, root, name)
    config.directory.mkdir(parents=True)
    (config.directory / "config.yaml").write_text(config_text(config))
    AttemptRecord(config, 0, "version")
    return config.directory


def test_a_damaged_run_does_not_hide_the_others(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        make_run(tmp_path, name)
    (tmp_path / "b" / "config.yaml").write_text("run: [")
    command = [sys.executable, "tools/status.py", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    assert "a: running" in result.stdout
    assert "c: running" in result.stdout
    assert result.stderr.startswith(f"error: config {tmp_path / 'b'}")


def test_an_ended_job_says_nothing_of_an_attempt_outside_slurm(tmp_path: Path) -> None:
    status = read_status(make_run(tmp_path, "here"))
    assert _corrected(status, JobState("COMPLETED")).state == "running"
