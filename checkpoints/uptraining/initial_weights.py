"""Initial weights of a Block Transformer made from a vanilla model (paper section 3.7, appendices G.8 and P).

Layers are assigned to the two decoders; the embedder starts as the mean of the token embeddings, the expansion as the
identity; token embeddings, head and final norm are copied. What has no counterpart starts as in pretraining.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from checkpoints.errors import CheckpointError
from checkpoints.uptraining.layer_assignment import Assignment, Method, assign_layers
from checkpoints.uptraining.token_states import token_states
from checkpoints.weights.weight_source import WeightSource
from parallel.component_config import DecoderConfig
from parallel.config import ModelConfig
from parallel.initialization import initial_tensor

TABLE = "vanilla.input.embedding.weight"


@dataclass(frozen=True)
class UptrainingOptions:
    """How the vanilla weights are used.

    Attributes:
        layers: assignment of layers.
        token_embeddings: `copied`: the vanilla table; `computed`: the state of each token, alone, after the layers that
            come before the token decoder's first one.
        seed: of the random assignment and of weights without a counterpart.
    """

    layers: Method = "partition"
    token_embeddings: Literal["copied", "computed"] = "copied"
    seed: int = 0


class UptrainedSource(WeightSource):
    """The initial weights, computed from the vanilla ones when they are read.

    Args:
        vanilla: the source; stays the caller's to close.
        target: settings of the Block Transformer.
        options: how the weights are used.

    Raises:
        CheckpointError: the models do not fit each other.
    """

    def __init__(self, vanilla: WeightSource, target: ModelConfig, options: UptrainingOptions) -> None:
        check_compatible(vanilla, target)
        _check_token_embeddings(target, options)
        super().__init__(vanilla.path, target, "uptrained", {})
        self.vanilla = vanilla
        self.options = options
        blocks, tokens = target.blocks.num_layers, target.tokens.num_layers
        assigned = assign_layers(options.layers, vanilla.model.vanilla.num_layers, blocks, tokens, options.seed)
        self._assignments: dict[str, Assignment] = dict(zip(("block_decoder", "token_decoder"), assigned, strict=True))

    @property
    def description(self) -> str:
        """What and where it is, in words."""
        return f"Block Transformer from {self.vanilla.description}"

    def dtype(self, name: str) -> torch.dtype:
        """All fp32."""
        return torch.float32

    def close(self) -> None:
        """Nothing of its own is open."""

    def read(self, name: str) -> Tensor:
        """Computes one parameter; see WeightSource."""
        layer = self._source_layers(self._checked_name(name))
        if layer is not None:
            sources = [self.vanilla.read(source) for source in layer]
            return sources[0] if len(sources) == 1 else torch.stack(sources).mean(dim=0)
        if name == "embedder.projection.weight":
            return _mean_projection(self.shapes[name])
        if name == "token_decoder.input.expansion.weight":
            return _repeated_identity(self.shapes[name])
        if name == "token_decoder.input.embedding.weight" and self._computes_embeddings:
            return token_states(self.vanilla, self._layers_before_tokens)
        copied = _copied_from(name, self.vanilla)
        if copied is not None:
            return self.vanilla.read(copied)
        return initial_tensor(name, self.shapes[name], self.model, self.options.seed)

    def origin(self, name: str) -> str:
        """Where a parameter comes from, in words."""
        layer = self._source_layers(name)
        if layer is not None:
            return " + ".join(layer) if len(layer) == 1 else f"mean of {' and '.join(layer)}"
        if name == "embedder.projection.weight":
            return "mean over the block: identity / block_length"
        if name == "token_decoder.input.expansion.weight":
            return "identity, repeated"
        if name == "token_decoder.input.embedding.weight" and self._computes_embeddings:
            return f"{TABLE} through vanilla layers 0 to {self._layers_before_tokens - 1}"
        return _copied_from(name, self.vanilla) or "initialized as in pretraining"

    def origins(self) -> Iterator[tuple[str, str]]:
        """Every parameter with its origin."""
        return ((name, self.origin(name)) for name in self.names)

    @property
    def _layers_before_tokens(self) -> int:
        return self._assignments["token_decoder"][0][0]

    @property
    def _computes_embeddings(self) -> bool:
        return self.options.token_embeddings == "computed" and self._layers_before_tokens > 0

    def _source_layers(self, name: str) -> list[str] | None:
        """Names of the vanilla parameters that a decoder layer's parameter is the mean of."""
        owner, separator, rest = name.partition(".layers.")
        if not separator or owner not in self._assignments:
            return None
        index, _, inner = rest.partition(".")
        sources = [f"vanilla.layers.{layer}.{inner}" for layer in self._assignments[owner][int(index)]]
        return sources if sources[0] in self.vanilla.shapes else None


def _copied_from(name: str, vanilla: WeightSource) -> str | None:
    copied = {
        "embedder.embedding.weight": TABLE,
        "token_decoder.input.embedding.weight": TABLE,
        "token_decoder.output.norm.weight": "vanilla.output.norm.weight",
        "token_decoder.output.norm.bias": "vanilla.output.norm.bias",
        "token_decoder.output.head.weight": (
            TABLE if vanilla.model.tie_word_embeddings else "vanilla.output.head.weight"
        ),
    }
    return copied.get(name)


def _mean_projection(shape: tuple[int, ...]) -> Tensor:
    """[D, L * D]: the mean of L vectors."""
    width, inputs = shape
    length = inputs // width
    return (torch.eye(width) / length).repeat(1, length)


def _repeated_identity(shape: tuple[int, ...]) -> Tensor:
    """[K * D, D]: every context vector is the context embedding."""
    outputs, width = shape
    return torch.eye(width).repeat(outputs // width, 1)


def check_compatible(vanilla: WeightSource, target: ModelConfig) -> None:
    """Checks that vanilla weights can become the target's.

    Raises:
        CheckpointError: naming what differs, on both sides.
    """
    source = vanilla.model
    if not target.is_block:
        raise CheckpointError("the target is a vanilla model; give the config of a Block Transformer")
    differences = [
        *_differing("vocab_size", source.vocab_size, target.vocab_size),
        *_backbone_differences(source, target),
        *_stack_differences(source.vanilla, target.blocks, "block_decoder"),
        *_stack_differences(source.vanilla, target.tokens, "token_decoder"),
    ]
    if target.tie_word_embeddings and not source.tie_word_embeddings:
        differences.append("tie_word_embeddings is false there and true here")
    if differences:
        raise CheckpointError(
            f"{vanilla.description} does not fit the target config: {'; '.join(differences)} (there: vanilla, here: "
            "target); change the config, or use another vanilla model"
        )
    width = target.blocks.hidden_size
    if target.embedder.kind != "lookup_projection" or target.embedder.vector_width(width, 1) != width:
        raise CheckpointError(
            f"uptraining averages full-width token embeddings, the target has embedder.kind={target.embedder.kind} and "
            f"embedder.table_width={target.embedder.table_width}; use embedder.kind=lookup_projection and "
            "embedder.table_width=null"
        )


def _check_token_embeddings(target: ModelConfig, options: UptrainingOptions) -> None:
    if options.token_embeddings == "copied":
        return
    if target.tie_word_embeddings:
        raise CheckpointError(
            "--token-embeddings computed does not go with model.tie_word_embeddings=true, where the head is the same "
            "table; use copied, or untie the head"
        )
    if not target.embeds_local_tokens:
        raise CheckpointError(
            f"--token-embeddings computed does not go with block_length={target.block_length}, where the token decoder "
            "has no table; use copied, or start with longer blocks"
        )


def _differing(name: str, there: object, here: object) -> list[str]:
    return [] if there == here else [f"{name} is {there} there and {here} here"]


def _backbone_differences(source: ModelConfig, target: ModelConfig) -> list[str]:
    there, here = source.backbone.model_dump(), target.backbone.model_dump()
    return [text for name in there for text in _differing(f"backbone.{name}", there[name], here[name])]


def _stack_differences(source: DecoderConfig, target: DecoderConfig, name: str) -> list[str]:
    compared = ("hidden_size", "num_attention_heads", "key_value_heads", "head_size", "feed_forward_size")
    fields = {"key_value_heads": "num_key_value_heads", "feed_forward_size": "ffn_hidden_size"}
    return [
        text
        for one in compared
        for text in _differing(f"{name}.{fields.get(one, one)}", getattr(source, one), getattr(target, one))
    ]
