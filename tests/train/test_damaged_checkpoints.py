"""A run whose newest checkpoint is damaged goes on from the one before, says why, and ends in the same weights."""

import io
import os
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

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

SAVED, LAST = (3, 6), 8


def _train(config: RunConfig) -> str:
    """Trains to the end; returns what was printed."""
    place = initialize_topology(config.parallel)
    requests = Requests(config.directory, StopSignals(), None, 0.0, watches_files=place.rank == 0)
    with redirect_stdout(io.StringIO()) as said:
        Trainer(config, place, requests).run()
    return said.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_small_corpus(tmp_path_factory.mktemp("corpus"))


def run_of(root: Path, shards: Path, stop_step: int) -> RunConfig:
    return small_run(root, shards, train={"stop_step": stop_step}, checkpoint={"every": 3, "keep_last": 9})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> RunConfig:
    config = run_of(tmp_path_factory.mktemp("saved"), shards, LAST)
    run_processes(2, _train, config)
    return config


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def weights(config: RunConfig) -> dict[str, torch.Tensor]:
    with FragmentReader(CheckpointStore(config.directory / "checkpoints").at_step(LAST).path) as reader:
        return {name: reader.read_full(name, "weight") for name in reader.names("weight")}


@pytest.mark.parametrize(
    ("damage", "file", "reason"),
    [
        (flip_a_bit, "rank_00001.safetensors", "is damaged: its checksum does not match the manifest"),
        (flip_a_bit, "manifest.json", "manifest.json is "),
        (truncate, "rank_00000.safetensors", "bytes instead of"),
        (Path.unlink, "rank_00001.safetensors", "is missing"),
    ],
)
def test_falls_back(
    tmp_path: Path, shards: Path, saved: RunConfig, damage: Callable[[Path], None], file: str, reason: str
) -> None:
    config = run_of(tmp_path, shards, LAST)
    for step in SAVED:
        name = Path("checkpoints") / f"step_{step:08d}"
        shutil.copytree(saved.directory / name, config.directory / name)
    damage(config.directory / "checkpoints" / "step_00000006" / file)
    said = run_processes(2, _train, config)[0]
    assert "skipped the checkpoint of step 6: " in said
    assert reason in said
    assert "resuming run small at step 3 from " in said
    expected, actual = weights(saved), weights(config)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
