"""Which tensors of the paper's reference code are which of our parameters."""

import re
from collections.abc import Iterator

from checkpoints.weights.huggingface_names import NEOX_LAYER, split_layer
from checkpoints.weights.parameter_shapes import Shape, parameter_shapes
from checkpoints.weights.weight_mapping import Rule, convolution, fused_heads, same
from parallel.config import ModelConfig

_STEMS = {
    "embedder.embedding": "embedder.embeddings",
    "embedder.projection": "embedder.projection_layer",
    "embedder.encoder.word_embedding": "embedder.embeddings.word_embeddings",
    "embedder.encoder.position_embedding": "embedder.embeddings.position_embeddings",
    "embedder.encoder.token_type_embedding": "embedder.embeddings.token_type_embeddings",
    "embedder.encoder.norm": "embedder.embeddings.LayerNorm",
    "block_decoder.output.norm": "block_decoder.gpt_neox.final_layer_norm",
    "token_decoder.input.expansion": "token_decoder.expansion_layer",
    "token_decoder.input.embedding": "token_decoder.gpt_neox.embed_in",
    "token_decoder.output.norm": "token_decoder.gpt_neox.final_layer_norm",
    "token_decoder.output.head": "token_decoder.embed_out",
}
_ENCODER_LAYER = {
    "attention.dense": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "feed_forward.expand": "intermediate.dense",
    "feed_forward.contract": "output.dense",
    "feed_forward_norm": "output.LayerNorm",
}
_BUFFERS = (
    r"(block|token)_decoder\.gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
    r"embedder\.embeddings\.(position_ids|token_type_ids)",
)
_HEAD_TABLE = "token_decoder.embed_out.weight"


def reference_rules(model: ModelConfig) -> list[Rule]:
    """The rules of a Block Transformer, in the order of our parameters."""
    return [_rule(name, shape, model) for name, shape in parameter_shapes(model).items()]


def unused_tables(model: ModelConfig) -> dict[str, Shape]:
    """Tables that the reference code keeps and never reads, with their shapes."""
    tables: dict[str, Shape] = {"block_decoder.gpt_neox.embed_in.weight": (model.vocab_size, model.blocks.hidden_size)}
    if not model.embeds_local_tokens:
        tables["token_decoder.gpt_neox.embed_in.weight"] = (model.vocab_size, model.tokens.hidden_size)
    return tables


def ignored_tensors(model: ModelConfig) -> Iterator[str]:
    """Patterns of tensors that a file may hold although the model does not need them."""
    yield from map(re.escape, unused_tables(model))
    yield from _BUFFERS


def vocabulary_size(shapes: dict[str, Shape]) -> int | None:
    """Rows of the head in the weights of a Block Transformer, None if they are of something else."""
    head = shapes.get(_HEAD_TABLE)
    return head[0] if head else None


def _rule(name: str, shape: Shape, model: ModelConfig) -> Rule:
    stem, _, kind = name.rpartition(".")
    if stem not in _STEMS:
        return _layer_rule(stem, kind, shape, model)
    theirs = f"{_STEMS[stem]}.{kind}"
    if kind == "weight" and stem == "embedder.projection":
        return convolution(name, theirs, shape, model.embedder.num_vectors(model.block_length))
    if kind == "weight" and stem == "token_decoder.input.expansion":
        return convolution(name, theirs, shape, 1)
    return same(name, theirs, shape)


def _layer_rule(stem: str, kind: str, shape: Shape, model: ModelConfig) -> Rule:
    owner, index, inner = split_layer(stem)
    name = f"{stem}.{kind}"
    if owner != "embedder.encoder":
        return same(name, f"{owner}.gpt_neox.layers.{index}.{NEOX_LAYER[inner]}.{kind}", shape)
    layer = f"embedder.encoder.layer.{index}"
    if inner != "attention.query_key_value":
        return same(name, f"{layer}.{_ENCODER_LAYER[inner]}.{kind}", shape)
    encoder = model.embedder.roberta
    theirs = tuple(f"{layer}.attention.self.{part}.{kind}" for part in ("query", "key", "value"))
    return fused_heads(name, theirs, shape, encoder.num_attention_heads, (encoder.stack.head_size,) * 3)
