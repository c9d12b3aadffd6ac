"""Interrupted runs against an undisturbed one: same losses, weights, moments and samples, bit for bit."""

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from checkpoints.fragments import FragmentReader
from checkpoints.records import KINDS
from checkpoints.store import CheckpointStore
from data.streaming.stream import PackedSequences
from parallel.errors import ConfigurationError
from parallel.topology import initialize_topology
from tests.processes import run_processes
from tests.train.small_run import prepare_small_corpus, small_run
from train.config import RunConfig
from train.requests import Requests
from train.stop_signals import StopSignals
from train.trainer import Ending, Trainer

Interruption = tuple[int, int, signal.Signals]  # after which step, which rank, by which signal
# An epoch has 41 sequences, a step 4, checkpoints come every 3 steps. With SIGTERM the run also saves where it stops.
INTERRUPTIONS: list[Interruption] = [
    (5, 1, signal.SIGTERM),  # in the middle of epoch 1, between checkpoints
    (8, 0, signal.SIGKILL),  # in the middle of epoch 1, two steps after a checkpoint
    (12, 1, signal.SIGKILL),  # in epoch 2, right after a checkpoint was published
    (13, 0, signal.SIGTERM),  # in epoch 2
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_small_corpus(tmp_path_factory.mktemp("corpus"))


class RecordingStream:
    """Notes the identity and contents of every sequence that is read, per step."""

    def __init__(self, stream: Any, path: Path) -> None:
        self._stream = stream
        self._path = path

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def read(self, position: int, count: int) -> PackedSequences:
        sequences: PackedSequences = self._stream.read(position, count)
        with self._path.open("a") as record:
            for row, sample in enumerate(self._stream.sample_ids(position, count)):
                contents = sequences.token_ids[row].tobytes() + sequences.mask[row].tobytes()
                line = [position + row, list(sample), hashlib.sha256(contents).hexdigest()]
                record.write(json.dumps(line) + "\n")
        return sequences


def train(config: RunConfig, interruption: Interruption | None) -> tuple[str, int]:
    place = initialize_topology(config.parallel)

    def after_step(step: int) -> None:
        if interruption and (step, place.rank) == interruption[:2]:
            os.kill(os.getpid(), interruption[2])

    requests = Requests(config.directory, StopSignals(), None, 0.0, watches_files=place.rank == 0)
    trainer = Trainer(config, place, requests, after_step)
    record = config.directory / f"samples_{place.rank}.jsonl"
    trainer.stream = RecordingStream(trainer.stream, record)  # type: ignore[assignment]
    outcome = trainer.run()
    return outcome.ending.name, outcome.step


def run(config: RunConfig, interruption: Interruption | None = None) -> None:
    killed = interruption is not None and interruption[2] is signal.SIGKILL
    results = run_processes(config.parallel.world_size, train, config, interruption, may_die=killed)
    if interruption is None:
        assert set(results) == {(Ending.COMPLETE.name, config.train.last_step)}
    elif not killed:
        # Noted during the step that was under way or the next one; all ranks leave at the same step.
        assert set(results) in ({(Ending.STOPPED.name, interruption[0])}, {(Ending.STOPPED.name, interruption[0] + 1)})


def final_tensors(config: RunConfig) -> dict[tuple[str, str], torch.Tensor]:
    checkpoint = CheckpointStore(config.directory / "checkpoints").newest()
    assert checkpoint is not None
    assert checkpoint.step == config.train.last_step
    with FragmentReader(checkpoint.path) as reader:
        return {(kind, name): reader.read_full(name, kind) for kind in KINDS for name in reader.names(kind)}


def scalars(config: RunConfig, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(config.directory / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def samples(config: RunConfig) -> list[str]:
    """What was read, in order of position; a position read by several attempts must have been the same."""
    lines = [line for path in config.directory.glob("samples_*.jsonl") for line in path.read_text().splitlines()]
    return sorted(set(lines), key=lambda line: json.loads(line)[0])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_interrupted_run_equals_undisturbed_run(tmp_path: Path, shards: Path, precision: str) -> None:
    settings = {"train": {"precision": precision}, "checkpoint": {"asynchronous": precision == "bf16"}}
    undisturbed = small_run(tmp_path, shards, "undisturbed", **settings)
    run(undisturbed)
    interrupted = small_run(tmp_path, shards, "interrupted", **settings)
    for interruption in INTERRUPTIONS:
        run(interrupted, interruption)
    run(interrupted)
    expected, actual = final_tensors(undisturbed), final_tensors(interrupted)
    assert expected.keys() == actual.keys()
    for key, tensor in expected.items():
        assert torch.equal(actual[key], tensor), key
    for tag in ("train/loss", "train/loss_by_position/4", "optimizer/learning_rate", "optimizer/gradient_norm"):
        assert scalars(interrupted, tag) == scalars(undisturbed, tag)
        assert [step for step, _ in scalars(interrupted, tag)] == list(range(1, 15))
    assert scalars(interrupted, "validation/loss") == scalars(undisturbed, "validation/loss")
    consumed = samples(undisturbed)
    assert [json.loads(line)[0] for line in consumed] == list(range(14 * 4))
    assert samples(interrupted) == consumed


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stop_at_the_exact_end_of_an_epoch(tmp_path: Path, shards: Path, precision: str) -> None:
    """41 sequences are one epoch: with one sequence per step, step 41 is its last."""
    train_section = {"steps": 44, "global_batch_size": 1, "precision": precision}
    length = {"train": train_section, "parallel": {"data": 1}, "checkpoint": {"every": 41, "asynchronous": False}}
    undisturbed = small_run(tmp_path, shards, "undisturbed", **length)
    run(undisturbed)
    interrupted = small_run(tmp_path, shards, "interrupted", **length)
    run(interrupted, (42, 0, signal.SIGKILL))
    assert CheckpointStore(interrupted.directory / "checkpoints").complete_steps() == [41]
    run(interrupted)
    expected, actual = final_tensors(undisturbed), final_tensors(interrupted)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    assert samples(interrupted) == samples(undisturbed)
    assert json.loads(samples(undisturbed)[41])[1][1] == 1, "position 41 is the first of the second epoch"
    assert scalars(interrupted, "train/loss") == scalars(undisturbed, "train/loss")


@pytest.mark.slow
def test_a_mixture_goes_on_with_fewer_processes_in_its_second_epoch(tmp_path: Path, shards: Path) -> None:
    """Two processes are killed when both sources are in epoch 2; one goes on, into a new stage."""
    tokenizer = shards / "tokenizer.model"
    books = prepare_small_corpus(tmp_path / "books", start=40_000, characters=1_500, tokenizer=tokenizer)
    sources = {"web": {"path": str(shards), "weight": 0.75}, "books": {"path": str(books), "weight": 0.25}}
    data = {"path": None, "sources": sources, "isolate_documents": True}
    stages = [{"from_tokens": 68 * 64, "weights": {"books": 1.0}}]
    length = {"train": {"steps": 20, "global_batch_size": 4}, "checkpoint": {"every": 4}}
    one = {"parallel": {"data": 1}}
    undisturbed = small_run(tmp_path, shards, "undisturbed", data={**data, "stages": stages}, **length, **one)
    run(undisturbed)
    interrupted = small_run(tmp_path, shards, "interrupted", data=data, **length)
    run(interrupted, (16, 1, signal.SIGKILL))
    run(small_run(tmp_path, shards, "interrupted", data={**data, "stages": stages}, **length, **one))
    consumed = [json.loads(line) for line in samples(undisturbed)]
    assert samples(interrupted) == [json.dumps(line) for line in consumed]
    assert {tuple(sample[:2]) for _, sample, _ in consumed[60:68]} == {("web", 1), ("books", 1)}
    assert {sample[0] for _, sample, _ in consumed[68:]} == {"books"}
    curves = [scalars(config, "train/loss") for config in (undisturbed, interrupted)]
    assert [step for step, _ in curves[1]] == list(range(1, 21))
    assert [loss for _, loss in curves[1]] == pytest.approx([loss for _, loss in curves[0]], rel=1e-5)


def test_other_data_under_a_running_job_is_named(tmp_path: Path, shards: Path) -> None:
    """What was read so far must not change."""
    length = {"train": {"steps": 4, "global_batch_size": 4}, "parallel": {"data": 1}}
    run(small_run(tmp_path, shards, **length))
    tokenizer = shards / "tokenizer.model"
    other = prepare_small_corpus(tmp_path / "other", start=40_000, tokenizer=tokenizer)
    retokenized = prepare_small_corpus(tmp_path / "retokenized", start=40_000)
    for path, words in (
        (other, "the shards of source corpus had the fingerprint"),
        (retokenized, "source corpus was made with the tokenizer"),
    ):
        config = small_run(tmp_path, shards, data={"path": str(path)}, **length)
        message = run_processes(1, refusal, config)[0]
        assert words in message
        assert "make the change a new stage (data.stages) from_tokens=1024 on" in message


def refusal(config: RunConfig) -> str:
    place = initialize_topology(config.parallel)
    with pytest.raises(ConfigurationError) as caught:
        Trainer(config, place, Requests(config.directory, StopSignals(), None, 0.0, watches_files=True))
    return str(caught.value)
