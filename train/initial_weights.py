"""What a new run starts from: weights of a checkpoint whose model is the run's own."""

from pathlib import Path
from typing import Any

from checkpoints.trained_model import find_trained_model
from parallel.component_config import DecoderConfig
from parallel.config import ModelConfig
from parallel.errors import ConfigurationError
from train.config import RunConfig
from train.run_directory import flatten

# They change neither a parameter nor what the model computes from it.
_FREE = ("sequence_length", "initializer_std", "embedder.encoder.dropout")


def initial_weights(config: RunConfig) -> Path | None:
    """The step directory that a new run takes its weights from, intact and of the same model.

    Raises:
        CheckpointError: there is no intact checkpoint.
        ConfigurationError: its model is another one. Shapes do not tell: heads are fused in one matrix.
    """
    if config.run.initial_weights is None:
        return None
    found = find_trained_model(config.run.initial_weights)
    differences = model_differences(found.model, config.model)
    if differences:
        raise ConfigurationError(
            f"run.initial_weights={config.run.initial_weights} holds another model: {'; '.join(differences)}; use "
            "weights of this model, or change these values"
        )
    return found.path


def model_differences(there: ModelConfig, here: ModelConfig) -> list[str]:
    """In what two models differ, with defaults filled in, in words."""
    first, second = _settings(there), _settings(here)
    return [
        f"model.{name} is {first.get(name)!r} there and {second.get(name)!r} here"
        for name in sorted(first.keys() | second.keys())
        if first.get(name) != second.get(name)
    ]


def _settings(model: ModelConfig) -> dict[str, Any]:
    values: dict[str, Any] = model.model_dump(exclude={"block_decoder", "token_decoder", "decoder", "embedder"})
    if not model.is_block:
        for name in ("block_length", "token_decoder_input", "prefix_length"):
            values.pop(name)
    else:
        values["embedder"] = _embedder(model)
        if model.token_decoder_input != "prefix":
            values.pop("prefix_length")
    for name in ("block_decoder", "token_decoder", "decoder"):
        stack = getattr(model, name)
        if stack is not None:
            values[name] = _stack(stack)
    flat = flatten(values)
    return {name: value for name, value in flat.items() if name not in _FREE}


def _embedder(model: ModelConfig) -> dict[str, Any]:
    embedder = model.embedder
    values: dict[str, Any] = {"kind": embedder.kind}
    if embedder.has_encoder:
        values["encoder"] = embedder.roberta.model_dump() | {
            "ffn_hidden_size": embedder.roberta.stack.feed_forward_size
        }
    else:
        values["table_width"] = embedder.vector_width(model.blocks.hidden_size, model.block_length)
    if embedder.kind == "roberta_cls":
        values["num_cls_tokens"] = embedder.num_cls_tokens
    return values


def _stack(stack: DecoderConfig) -> dict[str, Any]:
    return stack.model_dump() | {
        "num_key_value_heads": stack.key_value_heads,
        "attention_head_size": stack.head_size,
        "ffn_hidden_size": stack.feed_forward_size,
    }
