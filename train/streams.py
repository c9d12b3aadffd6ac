"""Opens the run's corpus. Imports no torch, so that mistakes are found before any process starts."""

from typing import Literal

from data.errors import DataError
from data.streaming.stream import SequenceStream
from train.config import RunConfig


def open_stream(config: RunConfig, split: Literal["train", "validation"]) -> SequenceStream:
    """Opens a split of the run's corpus.

    Raises:
        DataError: it is missing, damaged, too small, or its vocabulary is larger than the model's.
    """
    minimum = config.train.global_batch_size if split == "train" else 1
    stream = SequenceStream(
        config.data,
        split,
        block_length=config.model.unit_length,
        sequence_length=config.model.sequence_length,
        minimum_sequences=minimum,
    )
    if stream.vocab_size > config.model.vocab_size:
        raise DataError(
            f"{config.data.path} holds token ids up to {stream.vocab_size - 1}, but model.vocab_size="
            f"{config.model.vocab_size}; set model.vocab_size to at least {stream.vocab_size}"
        )
    return stream


def check_data(config: RunConfig) -> None:
    """Opens every split the run will read.

    Raises:
        DataError: see open_stream.
    """
    open_stream(config, "train")
    if config.validation.every:
        open_stream(config, "validation")
