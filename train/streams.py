"""Opens the run's corpus. Imports no torch, so that mistakes are found before any process starts."""

from typing import Any, Literal

from pydantic import ValidationError

from data.errors import DataError
from data.streaming.identity import StreamIdentity
from data.streaming.stream import SequenceStream
from parallel.errors import ConfigurationError
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
            f"the {split} data holds token ids up to {stream.vocab_size - 1}, but model.vocab_size="
            f"{config.model.vocab_size}; set model.vocab_size to at least {stream.vocab_size}"
        )
    return stream


def check_data(config: RunConfig) -> None:
    """Opens every split the run will read, and looks for all of its shards.

    Raises:
        DataError: see open_stream; or a shard is missing or has another size.
    """
    open_stream(config, "train").check_files()
    if config.validation.every:
        open_stream(config, "validation").check_files()


def continued(stream: SequenceStream, recorded: Any, position: int) -> dict[str, Any]:
    """Checks that a stream goes on with what a run has read so far.

    Args:
        stream: the run's stream now.
        recorded: the identity of the stream in the run's checkpoint.
        position: how many sequences of it were read.

    Returns:
        The stream's identity as JSON.

    Raises:
        ConfigurationError: it does not; names each difference.
    """
    try:
        before = StreamIdentity.model_validate(recorded)
    except ValidationError:
        raise ConfigurationError(
            "the checkpoint was written by another version of this code and does not say what data it was trained "
            "on; go on with that version, or start another run.name from it with run.initial_weights"
        ) from None
    general, of_stages = stream.identity.general_differences(before), stream.identity.differences(before, position)
    if general or of_stages:
        stage = f"make the change a new stage (data.stages) from_tokens={position * stream.sequence_length} on"
        raise ConfigurationError(
            f"the data differs from what the run was trained on so far: {'; '.join([*general, *of_stages])}; restore "
            f"it, or {'choose another run.name' if general else stage}"
        )
    return stream.identity.model_dump(mode="json")
