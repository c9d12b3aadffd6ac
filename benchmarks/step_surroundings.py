"""What a training step costs beside the model: reading its data, logging it, and sending between processes."""

import contextlib
import io
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.synthetic_corpus import write_synthetic_corpus
from data.streaming.stream import SequenceStream
from parallel.inputs import MicroBatch
from train.batches import read_micro_batches
from train.checkpointing import Progress
from train.config import RunConfig
from train.metrics import MeanLoss
from train.monitor import Monitor
from train.step import StepEngine
from train.throughput import SpeedMeter

REPEATS = 5
DOCUMENT_TOKENS = 2_000


def data_seconds(config: RunConfig, device: torch.device) -> float:
    """Median time to read a data-parallel rank's part of a global batch from shards on the local disk."""
    size = config.train.micro_batch_size
    rows = [range(start, start + size) for start in range(0, size * config.num_micro_batches, size)]
    tokens = (REPEATS + 2) * len(rows) * size * config.model.sequence_length
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "corpus"
        documents = max(8, 2 * tokens // DOCUMENT_TOKENS)
        write_synthetic_corpus(root, shards=1, documents=documents, tokens=2 * tokens)
        stream = SequenceStream(
            config.data.model_copy(update={"path": str(root), "sources": {}, "stages": (), "tokenizer": None}),
            "train",
            block_length=config.model.unit_length,
            sequence_length=config.model.sequence_length,
            minimum_sequences=len(rows) * size,
        )
        seconds = []
        for turn in range(REPEATS + 1):
            started = time.perf_counter()
            read_micro_batches(stream, turn * len(rows) * size, rows, device)
            seconds.append(time.perf_counter() - started)
    return sorted(seconds[1:])[REPEATS // 2]


def logging_seconds(config: RunConfig) -> float:
    """Median time to log a step to console and TensorBoard."""
    loss = MeanLoss(1.0, (1.0,) * config.model.unit_length, 1)
    seconds = []
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        tensorboard = Path(folder) / "tensorboard"
        tensorboard.mkdir()
        monitor = Monitor(config, tensorboard, 1, SpeedMeter(config.model, 1))
        for step in range(1, REPEATS + 1):
            started = time.perf_counter()
            monitor.step(step * config.logging.every, loss, 1e-3, 1.0, Progress(step, step, step, {}))
            seconds.append(time.perf_counter() - started)
        monitor.close()
    return sorted(seconds)[REPEATS // 2]


def communication_seconds(engine: StepEngine, batches: Sequence[MicroBatch]) -> float:
    """Time of a step in which this process has collectives or transfers under way; other work may go on meanwhile."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=activities) as recording:
        engine.accumulate(batches)
        engine.update(1e-4)
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in recording.events() or ()
        if event.name.startswith(("gloo:", "nccl"))
    )
    covered, until = 0.0, 0.0
    for start, end in spans:
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered / 1e6
