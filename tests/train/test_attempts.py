"""A run's history and what it says of the run, from real short runs."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from checkpoints.errors import CheckpointError
from checkpoints.inventory import explain, list_checkpoints, prune, verify
from parallel.errors import ConfigurationError
from parallel.topology import initialize_topology
from tests.processes import run_processes
from tests.train.small_run import prepare_small_corpus, small_run
from train.attempts import FILE, UNKNOWN_END, AttemptRecord, read_attempts
from train.config import RunConfig
from train.config_file import recorded_config
from train.requests import Requests
from train.run_directory import RunDirectory, writer_of
from train.status import describe, read_status
from train.stop_signals import StopSignals
from train.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]


def _train(config: RunConfig, at_step: int, number: signal.Signals) -> None:
    place = initialize_topology(config.parallel)

    def after_step(step: int) -> None:
        if step == at_step:
            trainer.checkpoints.wait()
        if step == at_step and place.rank == 0:
            os.kill(os.getpid(), number)

    requests = Requests(config.directory, StopSignals(), None, 0.0, place.rank == 0)
    trainer = Trainer(config, place, requests, after_step)
    trainer.run()


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run that was stopped, then killed, then went on to the end."""
    root = tmp_path_factory.mktemp("history")
    config = small_run(root, prepare_small_corpus(root), checkpoint={"every": 3, "keep_last": 9})
    run_processes(2, _train, config, 4, signal.SIGUSR1)
    run_processes(2, _train, config, 8, signal.SIGKILL, may_die=True)
    run_processes(2, _train, config, 0, signal.SIGTERM)
    return config


def test_attempts_say_where_they_began_and_why_they_ended(history: RunConfig) -> None:
    stopped, killed, last = read_attempts(history.directory)
    assert [attempt.number for attempt in (stopped, killed, last)] == [1, 2, 3]
    assert (stopped.step, stopped.reason, killed.reason, last.reason) == (0, "stopped: SIGUSR1", None, "complete")
    assert stopped.end_step in (4, 5)
    assert killed.step == stopped.end_step
    assert last.end_step == 14
    assert stopped.layout == "tensor 1 x pipeline 1 x data 2, ZeRO 1"
    for attempt in (stopped, killed, last):
        assert list(attempt.startup) == ["checkpoint", "first_batch", "first_step"]
        recorded = history.directory / "attempts" / f"{attempt.number:04d}.yaml"
        assert recorded_config(recorded) == history


def test_the_time_to_the_first_step_is_in_tensorboard(history: RunConfig) -> None:
    events = EventAccumulator(str(history.directory / "tensorboard"))
    events.Reload()
    firsts = [attempt.step + 1 for attempt in read_attempts(history.directory)]
    for phase in ("checkpoint", "first_batch", "first_step", "total"):
        assert [event.step for event in events.Scalars(f"startup/{phase}_seconds")] == firsts
    reasons = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("attempt/text_summary")]
    assert reasons == ["attempt 2; the one before: stopped: SIGUSR1", f"attempt 3; the one before: {UNKNOWN_END}"]


def test_event_files_are_in_the_order_of_the_attempts(history: RunConfig) -> None:
    """Readers sort them by name, that is by the second; attempts that follow each other within one must not mix."""
    names = sorted(path.name for path in (history.directory / "tensorboard").iterdir())
    seconds = [int(name.split(".")[3]) for name in names]
    assert len(set(seconds)) == len(seconds) == 3


def test_status_of_a_run_that_is_complete(history: RunConfig) -> None:
    status = read_status(history.directory)
    assert (status.state, status.step, status.checkpoint) == ("complete", 14, 14)
    text = describe(status)
    assert "small: complete" in text
    assert "step 14 of 14, 3,584 tokens" in text
    assert "newest checkpoint: step 14" in text


def test_status_of_a_run_that_was_killed(tmp_path: Path, history: RunConfig) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text((history.directory / "config.yaml").read_text())
    lines = (history.directory / FILE).read_text().splitlines(keepends=True)
    (folder / FILE).write_text("".join(lines[:4]) + '{"number": 3, "torn')
    status = read_status(folder)
    assert (status.state, status.last_end, status.checkpoint) == ("running", "stopped: SIGUSR1", None)
    (folder / FILE).write_text("".join(lines[:6]))
    assert read_status(folder).last_end == UNKNOWN_END
    with pytest.raises(ConfigurationError, match="not the folder of a run"):
        read_status(tmp_path)


def test_what_a_full_disk_leaves_of_the_history_does_not_keep_a_run_from_starting(tmp_path: Path) -> None:
    config = small_run(tmp_path, tmp_path)
    config.directory.mkdir(parents=True)
    (config.directory / FILE).write_text(
        '{"number": 1, "ended": 1.0, "reason": "its start is missing"}\n{"number": 2, "t'
    )
    AttemptRecord(config, 3, "version").end(5, "complete")
    (attempt,) = read_attempts(config.directory)
    assert (attempt.number, attempt.step, attempt.reason) == (2, 3, "complete")


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_checkpoints_are_listed_verified_explained_and_pruned(history: RunConfig) -> None:
    run = history.directory
    assert "step 14: " in list_checkpoints(run)
    report, intact = verify(run)
    assert intact
    assert "step 12: intact, 2 files" in report
    explained = explain(run)
    assert "as exp_avg, exp_avg_sq, weight" in explained
    assert "'zero_stage': 1" in explained
    damage(run / "checkpoints" / "step_00000012" / "rank_00001.safetensors")
    report, intact = verify(run, 12)
    assert not intact
    assert "step 12: damaged: " in report
    before: Any = prune(run, 1, 6, dry_run=True)
    assert "would delete steps: " in before
    assert prune(run, 1, 6, dry_run=False) == before.replace("would delete", "deleted")
    assert "step 9:" not in list_checkpoints(run)
    damage(run / "checkpoints" / "step_00000014" / "rank_00001.safetensors")
    assert prune(run, 1, None, dry_run=False) == "deleted steps: none", "the only intact one stays"
    with pytest.raises(CheckpointError, match="no checkpoint of step 3"):
        verify(run, 3)
    with pytest.raises(CheckpointError, match="--keep 0"):
        prune(run, 0, None, dry_run=True)
    with pytest.raises(CheckpointError, match="give the folder of a run"):
        list_checkpoints(run / "tensorboard")


def test_a_run_that_is_being_written_is_not_pruned(tmp_path: Path, history: RunConfig) -> None:
    directory = RunDirectory(history)
    assert writer_of(directory.path) is None
    directory.open()
    command = [sys.executable, "tools/manage_checkpoints.py", "prune", str(directory.path)]
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    finally:
        directory.close()
    assert result.returncode == 2
    assert f"is being written (process {os.getpid()} on " in result.stderr
    assert writer_of(tmp_path) is None
