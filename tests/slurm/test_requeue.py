"""When a job is put back into the queue; what Slurm does with it is tested where there is one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import slurm.requeue
from slurm.requeue import FILE, MAXIMUM_WITHOUT_PROGRESS, decide, newest_step


def note(run: Path, *steps: int) -> None:
    with (run / FILE).open("a") as file:
        file.writelines(json.dumps({"time": 0.0, "job": "1", "status": 1, "step": step}) + "\n" for step in steps)


def checkpoint(run: Path, step: int) -> None:
    (run / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)


@pytest.mark.parametrize(
    ("status", "again", "reason"),
    [
        (0, False, "the run ended"),
        (2, False, "an error that a restart would meet again"),
        (143, True, "it was stopped at step 40"),
        (1, True, "it failed with status 1 at step 40"),
        (137, True, "it failed with status 137 at step 40"),
    ],
)
def test_what_the_status_means(tmp_path: Path, status: int, again: bool, reason: str) -> None:
    checkpoint(tmp_path, 40)
    decision, said = decide(tmp_path, status, "1")
    assert decision is again
    assert reason in said


def test_restarts_without_progress_are_capped(tmp_path: Path) -> None:
    assert newest_step(tmp_path) == 0
    assert decide(tmp_path, 1, "1")[0], "a run may fail before it has a folder"
    checkpoint(tmp_path, 40)
    note(tmp_path, *[40] * (MAXIMUM_WITHOUT_PROGRESS - 1))
    assert decide(tmp_path, 1, "1")[0]
    note(tmp_path, 40)
    again, reason = decide(tmp_path, 1, "1")
    assert not again
    assert "3 restarts in a row made no checkpoint after step 40" in reason
    assert decide(tmp_path, 1, "2")[0], "somebody submitted it again"
    checkpoint(tmp_path, 50)
    assert decide(tmp_path, 1, "1")[0], "it got on"
    (tmp_path / "checkpoints" / "step_00000060.tmp-ab").mkdir()
    assert newest_step(tmp_path) == 50


def test_a_torn_record_does_not_matter(tmp_path: Path) -> None:
    note(tmp_path, 0, 0)
    with (tmp_path / FILE).open("a") as file:
        file.write('{"time": 1.0, "jo')
    assert decide(tmp_path, 1, "1")[0]
    slurm.requeue._note(tmp_path, 1, "1")
    assert not decide(tmp_path, 1, "1")[0], "the note after the torn one counts"


def test_the_decision_needs_no_packages() -> None:
    """Outside a container there may be none."""
    modules = "import sys; sys.path.insert(0, '.'); import slurm.requeue, slurm.rendezvous_port"
    subprocess.run([sys.executable, "-I", "-S", "-c", modules], cwd=Path(slurm.requeue.__file__).parents[1], check=True)
