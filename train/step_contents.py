"""Which sequences and documents a step reads on a rank: known before and after."""

from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

from checkpoints.store import CheckpointStore
from data.streaming.stream import SequenceStream
from data.tokenizer import Tokenizer
from parallel.errors import ConfigurationError
from train.batches import micro_batch_rows
from train.config import RunConfig
from train.config_file import load_config, recorded_config
from train.streams import continued, open_stream

SHOWN_CHARACTERS = 300


def describe_step(
    location: Path, overrides: list[str], step: int, rank: int | None, tokenizer: Tokenizer | None
) -> str:
    """Says what a step of a run read or will read.

    Args:
        location: Folder of a run, or a configuration file.
        overrides: `section.field=value`, for a configuration file.
        step: Number of the optimizer step, from 1.
        rank: Only the sequences of this rank.
        tokenizer: Shows the text of each sequence.

    Returns:
        Lines for a person: position, source, epoch, shard, sequence and documents of each sequence.

    Raises:
        ConfigurationError: There is no such run, step or rank, or the run was trained on other data.
        DataError: The data is not there.
        CheckpointError: The run's newest checkpoint is damaged.
    """
    config, left_out, recorded = _run(location, overrides)
    if not 1 <= step <= config.train.steps:
        raise ConfigurationError(f"--step {step} must be from 1 to train.steps={config.train.steps}")
    stream = open_stream(config, "train")
    if recorded is not None:
        continued(stream, *recorded)
    position = step_position(step, config.train.global_batch_size, left_out)
    lines = [
        f"step {step} of {config.run.name}: sequences {position:,} to "
        f"{position + config.train.global_batch_size - 1:,} of the stream"
    ]
    for data_rank in range(config.parallel.data) if rank is None else [_data_rank(config, rank)]:
        lines.append(f"data-parallel rank {data_rank}")
        lines += _rank_lines(config, stream, position, data_rank, tokenizer)
    return "\n".join(lines)


def step_position(step: int, global_batch_size: int, left_out: Collection[int]) -> int:
    """Where in the stream a step's global batch starts.

    Args:
        step: Number of the step, from 1.
        global_batch_size: Sequences per step.
        left_out: Positions whose batches are passed over.

    Returns:
        Position of its first sequence.
    """
    position = (step - 1) * global_batch_size
    for passed in sorted(left_out):
        position += global_batch_size if passed <= position else 0
    return position


def _run(location: Path, overrides: list[str]) -> tuple[RunConfig, tuple[int, ...], tuple[object, int] | None]:
    """Configuration, positions left out, and what stream was read up to which position."""
    if not location.is_dir():
        return load_config(location, overrides), (), None
    if overrides:
        raise ConfigurationError(f"{location} is a run, whose settings are recorded; leave out {' '.join(overrides)}")
    config = recorded_config(location / "config.yaml")
    newest = CheckpointStore(location / "checkpoints").newest()
    progress = newest.metadata.get("progress") if newest else None
    if not isinstance(progress, dict):
        return config, (), None
    return config, tuple(progress["left_out"]), (progress["stream"], progress["consumed_sequences"])


def _data_rank(config: RunConfig, rank: int) -> int:
    if not 0 <= rank < config.parallel.world_size:
        raise ConfigurationError(f"--rank {rank} must be from 0 to {config.parallel.world_size - 1}")
    return config.parallel.data_rank(rank)


def _rank_lines(
    config: RunConfig, stream: SequenceStream, position: int, data_rank: int, tokenizer: Tokenizer | None
) -> Iterator[str]:
    rows = micro_batch_rows(
        config.train.global_batch_size, config.parallel.data, data_rank, config.train.micro_batch_size
    )
    for number, micro_batch in enumerate(rows):
        for row in micro_batch:
            yield f"  micro-batch {number}, " + _sequence_line(stream, position + row)
            if tokenizer is not None:
                read = stream.read(position + row, 1)
                yield "    " + repr(tokenizer.decode(read.token_ids[read.mask].tolist())[:SHOWN_CHARACTERS])


def _sequence_line(stream: SequenceStream, position: int) -> str:
    (sample,) = stream.sample_ids(position, 1)
    documents = np.unique(stream.documents(position))
    return (
        f"position {position:,}: {sample.source}, epoch {sample.epoch}, shard {sample.shard} sequence "
        f"{sample.sequence}, documents {documents[0]} to {documents[-1]} of the shard"
    )
