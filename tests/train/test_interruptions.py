"""Signals in the middle of a validation and again and again during a save; saves that fail or lose a rank."""

import errno
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from checkpoints.errors import CheckpointError
from checkpoints.fragments import FragmentReader
from checkpoints.store import CheckpointStore
from parallel.topology import initialize_topology
from tests.processes import run_processes
from tests.train.small_run import prepare_small_corpus, small_run
from train.attempts import read_attempts
from train.config import RunConfig
from train.requests import Requests
from train.stop_signals import SIGNALS, StopSignals
from train.trainer import Trainer


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_small_corpus(tmp_path_factory.mktemp("corpus"))


def make_trainer(config: RunConfig) -> Trainer:
    place = initialize_topology(config.parallel)
    return Trainer(config, place, Requests(config.directory, StopSignals(), None, 0.0, watches_files=place.rank == 0))


def _train(config: RunConfig) -> tuple[str, int]:
    outcome = make_trainer(config).run()
    return outcome.ending.name, outcome.step


def _stopped_in_validation(config: RunConfig) -> tuple[str, int]:
    """Rank 1 gets a signal when its second micro-batch of the first validation is read."""
    trainer = make_trainer(config)
    assert trainer.validation is not None
    stream, reads = trainer.validation.stream, [0]

    class SignallingStream:
        def __getattr__(self, name: str) -> Any:
            return getattr(stream, name)

        def read(self, position: int, count: int) -> Any:
            reads[0] += 1
            if reads[0] == 2 and trainer.place.rank == 1:
                os.kill(os.getpid(), signal.SIGUSR2)
            return stream.read(position, count)

    trainer.validation.stream = SignallingStream()  # type: ignore[assignment]
    outcome = trainer.run()
    assert trainer.progress.validation_due, "the rest of the validation was left"
    return outcome.ending.name, outcome.step


def _signalled_during_saves(config: RunConfig) -> tuple[str, int]:
    """Every file operation of the save that a first signal causes is met by all signals again."""
    trainer = make_trainer(config)
    armed = [False]

    def on_event(event: str, arguments: tuple[Any, ...]) -> None:
        if armed[0] and str(arguments[:1]).find(str(trainer.directory.checkpoints)) >= 0:
            for number in SIGNALS:
                os.kill(os.getpid(), number)

    def after_step(step: int) -> None:
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
            armed[0] = True

    sys.addaudithook(on_event)
    trainer.after_step = after_step
    outcome = trainer.run()
    armed[0] = False
    return outcome.ending.name, outcome.step


def _killed_in_the_last_save(config: RunConfig) -> None:
    """Rank 1 is killed when it writes its part of the last checkpoint."""
    trainer = make_trainer(config)

    def on_event(event: str, arguments: tuple[Any, ...]) -> None:
        if trainer.place.rank == 1 and "step_00000014.tmp" in str(arguments[:1]):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(on_event)
    trainer.run()


def _with_a_disk_that_fills(config: RunConfig) -> tuple[str, int]:
    """Rank 1 can write no checkpoint."""
    trainer = make_trainer(config)

    def on_event(event: str, arguments: tuple[Any, ...]) -> None:
        if trainer.place.rank == 1 and "rank_00001.safetensors" in str(arguments[:1]):
            raise OSError(errno.ENOSPC, "No space left on device")

    sys.addaudithook(on_event)
    with pytest.raises(CheckpointError, match="No space left on device; free space"):
        trainer.run()
    return "failed", trainer.progress.step


def points(config: RunConfig, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(config.directory / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def weights(config: RunConfig) -> dict[str, torch.Tensor]:
    loaded = CheckpointStore(config.directory / "checkpoints").newest()
    assert loaded is not None
    with FragmentReader(loaded.path) as reader:
        return {name: reader.read_full(name, "weight") for name in reader.names("weight")}


@pytest.mark.parametrize("interruption", [_stopped_in_validation, _signalled_during_saves])
def test_nothing_is_lost_or_torn(tmp_path: Path, shards: Path, interruption: Any) -> None:
    sections: dict[str, Any] = {"validation": {"every": 5, "sequences": 40}, "checkpoint": {"every": 100}}
    undisturbed = small_run(tmp_path, shards, "undisturbed", **sections)
    run_processes(2, _train, undisturbed)
    config = small_run(tmp_path, shards, "interrupted", **sections)
    for _ in range(2 if interruption is _stopped_in_validation else 1):  # the making up is stopped, too
        stopped = set(run_processes(2, interruption, config))
        assert stopped in ({("STOPPED", 4)}, {("STOPPED", 5)})
    assert set(run_processes(2, _train, config)) == {("COMPLETE", 14)}
    expected, actual = weights(undisturbed), weights(config)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    for tag in ("train/loss", "validation/loss", "progress/sequences"):
        assert points(config, tag) == points(undisturbed, tag)


def test_a_rank_lost_in_the_last_save_is_no_mistake_of_the_user(tmp_path: Path, shards: Path) -> None:
    """A mistake's status would keep the job from being put back into the queue."""
    config = small_run(tmp_path, shards, checkpoint={"every": 6})
    run_processes(2, _killed_in_the_last_save, config, may_die=True)
    assert str(read_attempts(config.directory)[-1].reason).startswith("RuntimeError: ")
    assert set(run_processes(2, _train, config)) == {("COMPLETE", 14)}


def test_all_ranks_leave_at_the_same_step_when_a_second_save_fails(tmp_path: Path, shards: Path) -> None:
    config = small_run(tmp_path, shards)
    assert set(run_processes(2, _with_a_disk_that_fills, config)) == {("failed", 7)}


def _with_a_folder_that_is_missing_once(config: RunConfig) -> tuple[str, int]:
    """The first save cannot even be begun."""
    trainer = make_trainer(config)
    store = trainer.checkpoints.store
    root = store.root

    def after_step(step: int) -> None:
        store.root = config.directory / "config.yaml" / "checkpoints" if step == 3 else root

    trainer.after_step = after_step
    outcome = trainer.run()
    return outcome.ending.name, outcome.step


def test_a_save_that_cannot_be_begun_is_passed_over_once(tmp_path: Path, shards: Path) -> None:
    config = small_run(tmp_path, shards, checkpoint={"keep_last": 9})
    assert set(run_processes(2, _with_a_folder_that_is_missing_once, config)) == {("COMPLETE", 14)}
    assert CheckpointStore(config.directory / "checkpoints").complete_steps() == [6, 9, 12, 14]
