"""Ranks of a real run are killed at every point of a save; the next start finds a complete checkpoint and goes on.

The points are the file operations of the save on rank 0 and on rank 1, as the interpreter's audit events and calls of
fsync show them, and bytes in the middle of the files that the ranks write. Each attempt resumes what the one before
left, is killed at the next point, and so on until no point is left; then the run goes on to its end undisturbed.
"""

import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints.fragments import FragmentReader
from checkpoints.store import CheckpointStore
from parallel.topology import initialize_topology
from tests.processes import run_processes
from tests.train.small_run import prepare_small_corpus, small_run
from train.config import RunConfig
from train.requests import Requests
from train.stop_signals import StopSignals
from train.trainer import Trainer

OPERATIONS = frozenset({"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir"})
STEPS, KEPT = 400, 2
TORN_FILES = [1, 1 << 10, 10_000, 50_000, 100_000, 150_000]  # bytes; each rank's file has about 200,000
LIMIT_OF_POINTS = 60
Point = tuple[int, str, int]  # rank, kind, number


class Killer:
    """Ends this process, as SIGKILL does, at one point of its saves after it is armed."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        self.left = 0
        sync = os.fsync

        def counted_sync(descriptor: int) -> None:
            self.count()
            sync(descriptor)

        os.fsync = counted_sync
        sys.addaudithook(self.on_event)

    def arm(self, kind: str, number: int) -> None:
        if kind == "operation":
            self.left = number
            return
        # A file that grows beyond the limit ends its writer in the middle of a write.
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (number, number))

    def on_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.left and event in OPERATIONS and str(arguments[0]).startswith(self.folder):
            self.count()

    def count(self) -> None:
        if self.left:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def _train(config: RunConfig, point: Point | None) -> int:
    """Trains two steps with a checkpoint after each; one rank is killed at a point of the second save."""
    place = initialize_topology(config.parallel)
    requests = Requests(config.directory, StopSignals(), None, 0.0, watches_files=place.rank == 0)

    def after_step(step: int) -> None:
        if point is not None and point[0] == place.rank and step == first + 1:
            trainer.checkpoints.wait()
            killer.arm(*point[1:])

    trainer = Trainer(config, place, requests, after_step)
    first = trainer.progress.step + 1
    killer = Killer(trainer.directory.checkpoints)
    trainer.run()
    return first


def run_of(root: Path, shards: Path, name: str, stop_step: int, asynchronous: bool) -> RunConfig:
    checkpoint = {"every": 1, "keep_last": KEPT, "asynchronous": asynchronous}
    length = {"steps": STEPS, "stop_step": stop_step}
    return small_run(root, shards, name, train=length, checkpoint=checkpoint, validation={"every": 0})


def newest(config: RunConfig) -> int:
    """The newest complete checkpoint's step, every byte of it checked."""
    found = CheckpointStore(config.directory / "checkpoints").newest()
    assert found is None or found.skipped == (), found.skipped
    return 0 if found is None else found.step


def points(step: int) -> Iterator[Point]:
    """Every `step`-th point; those of an operation end when the save has no more of them."""
    for rank in (0, 1):
        for number in range(1, LIMIT_OF_POINTS, step):
            yield rank, "operation", number
        for size in TORN_FILES[:: min(step, 3)]:
            yield rank, "torn file", size


def kill_everywhere(root: Path, shards: Path, step: int, asynchronous: bool) -> int:
    """Kills at each point in turn; returns how many kills there were."""
    kills, exhausted = 0, set()
    for point in points(step):
        if (point[0], point[1]) in exhausted:
            continue
        before = newest(run_of(root, shards, "killed", STEPS, asynchronous))
        config = run_of(root, shards, "killed", before + 2, asynchronous)
        run_processes(2, _train, config, point, may_die=True)
        after = newest(config)
        assert before + 1 <= after <= before + 2, (
            f"after {point} step {after} is the newest, {before + 1} was published"
        )
        attempts = (config.directory / "attempts.jsonl").read_text()
        if '"reason": "complete"' in attempts.splitlines()[-1]:
            exhausted.add(point[:2])
        else:
            kills += 1
    return kills


def weights(config: RunConfig) -> dict[str, torch.Tensor]:
    loaded = CheckpointStore(config.directory / "checkpoints").newest()
    assert loaded is not None
    with FragmentReader(loaded.path) as reader:
        return {f"{kind} {name}": reader.read_full(name, kind) for kind in ("weight",) for name in reader.names(kind)}


def check(root: Path, step: int, asynchronous: bool) -> int:
    shards = prepare_small_corpus(root)
    kills = kill_everywhere(root, shards, step, asynchronous)
    last = newest(run_of(root, shards, "killed", STEPS, asynchronous)) + 2
    killed = run_of(root, shards, "killed", last, asynchronous)
    run_processes(2, _train, killed, None)
    assert newest(killed) == last
    undisturbed = run_of(root, shards, "undisturbed", last, asynchronous)
    run_processes(2, _train, undisturbed, None)
    expected, actual = weights(undisturbed), weights(killed)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    store = CheckpointStore(killed.directory / "checkpoints")
    assert store.complete_steps() == [last - 1, last]
    return kills


@pytest.mark.slow
def test_some_points_of_a_save(tmp_path: Path) -> None:
    assert check(tmp_path, 9, asynchronous=True) >= 6


@pytest.mark.whole
@pytest.mark.parametrize("asynchronous", [True, False])
def test_every_point_of_a_save(tmp_path: Path, asynchronous: bool) -> None:
    assert check(tmp_path, 1, asynchronous) >= 40
