"""Reads tests/golden: weights, inputs, outputs and gradients recorded from the reference implementation.

Maps the reference's parameter names to ours. Golden files hold two sequences of eight blocks in fp32.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from parallel.component_config import DecoderConfig, EmbedderConfig, EncoderConfig
from parallel.config import ModelConfig, ParallelConfig
from parallel.inputs import MicroBatch
from parallel.stage import Stage, build_stage

GOLDEN = Path(__file__).parent / "golden"
BLOCK_VARIANTS = (
    "main_prefix_b4",
    "prefix_b1",
    "prefix_b2",
    "prefix_b8",
    "prefix_r1_b4",
    "vocab_padded_b4",
    "lookup_proj_b4",
    "roberta_prefix_b4",
    "roberta_cls_prefix_b4",
    "roberta_cls_sum_b4",
    "summation_b4",
    "megabyte_sum_b4",
)
HEAD_SIZE = 16
NUM_BLOCKS = 8

_LAYER_NAMES = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "feed_forward_norm",
    "attention.query_key_value": "attention.query_key_value",
    "attention.dense": "attention.dense",
    "mlp.dense_h_to_4h": "feed_forward.expand",
    "mlp.dense_4h_to_h": "feed_forward.contract",
}
_BLOCK_NAMES = {
    "embedder.embeddings": "embedder.embedding",
    "embedder.projection_layer": "embedder.projection",
    "embedder.embeddings.word_embeddings": "embedder.encoder.word_embedding",
    "embedder.embeddings.position_embeddings": "embedder.encoder.position_embedding",
    "embedder.embeddings.token_type_embeddings": "embedder.encoder.token_type_embedding",
    "embedder.embeddings.LayerNorm": "embedder.encoder.norm",
    "block_decoder.gpt_neox.final_layer_norm": "block_decoder.output.norm",
    "token_decoder.expansion_layer": "token_decoder.input.expansion",
    "token_decoder.gpt_neox.embed_in": "token_decoder.input.embedding",
    "token_decoder.gpt_neox.final_layer_norm": "token_decoder.output.norm",
    "token_decoder.embed_out": "token_decoder.output.head",
}
_ENCODER_NAMES = {
    "attention.output.dense": "attention.dense",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "feed_forward.expand",
    "output.dense": "feed_forward.contract",
    "output.LayerNorm": "feed_forward_norm",
}
_VANILLA_NAMES = {
    "gpt_neox.embed_in": "vanilla.input.embedding",
    "gpt_neox.final_layer_norm": "vanilla.output.norm",
    "embed_out": "vanilla.output.head",
}


@dataclass(frozen=True)
class GoldenSet:
    """One variant: its configuration, weights under our names, and recorded tensors."""

    name: str
    config: ModelConfig
    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    generation: dict[str, Tensor]

    def batch(self, case: str) -> MicroBatch:
        """The recorded inputs of a case as a micro-batch of two sequences."""
        ids = self.inputs[f"{case}.input_ids"].reshape(2, -1)
        mask = self.inputs[f"{case}.attention_mask"].reshape(2, -1).bool()
        return MicroBatch(ids, mask)

    def gradients(self, case: str) -> dict[str, Tensor]:
        """The recorded gradients of a case under our names."""
        return rename(load_file(GOLDEN / self.name / f"grads_{case}.safetensors"), self.config)


def load_golden(name: str) -> GoldenSet:
    """Loads one variant."""
    folder = GOLDEN / name
    weights = load_file(folder / "model.safetensors")
    outputs = load_file(folder / "outputs.safetensors")
    config = _vanilla_config(weights) if name == "vanilla" else _block_config(name, weights, outputs)
    return GoldenSet(
        name=name,
        config=config,
        weights=rename(weights, config),
        inputs=load_file(folder / "inputs.safetensors"),
        outputs=outputs,
        generation=load_file(folder / "generation.safetensors"),
    )


@lru_cache(maxsize=8)
def golden_stage(name: str) -> tuple[GoldenSet, Stage]:
    """One variant and the unsharded model with its weights."""
    golden = load_golden(name)
    stage = build_stage(golden.config, ParallelConfig(), seed=None)
    ours = {name for name, _ in stage.named_parameters()}
    assert ours == set(golden.weights), "every parameter has a recorded value and the reverse"
    stage.load_state_dict(golden.weights, strict=False)
    return golden, stage


def _block_config(name: str, weights: dict[str, Tensor], outputs: dict[str, Tensor]) -> ModelConfig:
    vocab_size, width = weights["token_decoder.embed_out.weight"].shape
    block_width = len(weights["block_decoder.gpt_neox.final_layer_norm.weight"])
    block_layers = sum(key.endswith("attention.dense.bias") for key in weights if key.startswith("block_decoder"))
    length = outputs["nopad.logits"].shape[2]
    return ModelConfig(
        vocab_size=vocab_size,
        sequence_length=NUM_BLOCKS * length,
        block_length=length,
        embedder=_embedder_config(name, weights),
        token_decoder_input="summation" if "_sum_" in name or "summation" in name else "prefix",
        prefix_length=weights["token_decoder.expansion_layer.weight"].shape[0] // width,
        block_decoder=_stack(block_layers, block_width),
        token_decoder=_stack(2, width),
    )


def _stack(num_layers: int, width: int) -> DecoderConfig:
    return DecoderConfig(num_layers=num_layers, hidden_size=width, num_attention_heads=width // HEAD_SIZE)


def _embedder_config(name: str, weights: dict[str, Tensor]) -> EmbedderConfig:
    if name.startswith("lookup_proj"):
        return EmbedderConfig(kind="lookup_projection", table_width=weights["embedder.embeddings.weight"].shape[1])
    if not name.startswith("roberta"):
        return EmbedderConfig()
    encoder = EncoderConfig(num_layers=2, hidden_size=32, num_attention_heads=2)
    return EmbedderConfig(kind="roberta_cls" if "cls" in name else "roberta", encoder=encoder)


def _vanilla_config(weights: dict[str, Tensor]) -> ModelConfig:
    vocab_size, width = weights["embed_out.weight"].shape
    return ModelConfig(architecture="vanilla", vocab_size=vocab_size, sequence_length=32, decoder=_stack(4, width))


def rename(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our name for each reference tensor; drops the tables the reference never uses."""
    renamed = _encoder_attention(tensors)
    for key, value in tensors.items():
        stem, _, kind = key.rpartition(".")
        if stem == "block_decoder.gpt_neox.embed_in":
            continue
        if stem == "token_decoder.gpt_neox.embed_in" and config.block_length == 1:
            continue
        if ".attention.self." in stem:
            continue
        # A convolution over the block as a linear layer of the concatenated vectors.
        matrix = value.permute(0, 2, 1).flatten(1) if value.dim() == 3 else value
        renamed[f"{_stem(stem, config)}.{kind}"] = matrix
    return renamed


def _encoder_attention(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """RoBERTa's query, key and value as one tensor with rows [head][query | key | value]."""
    fused = {}
    for key in tensors:
        if ".attention.self.query." in key:
            layer = key.split(".layer.")[1].split(".")[0]
            parts = [tensors[key.replace("query", kind)] for kind in ("query", "key", "value")]
            heads = torch.stack([part.unflatten(0, (-1, HEAD_SIZE)) for part in parts], dim=1)
            kind = key.rpartition(".")[2]
            fused[f"embedder.encoder.layers.{layer}.attention.query_key_value.{kind}"] = heads.flatten(0, 2)
    return fused


def _stem(stem: str, config: ModelConfig) -> str:
    known = _BLOCK_NAMES if config.is_block else _VANILLA_NAMES
    if stem in known:
        return known[stem]
    if stem.startswith("embedder.encoder"):
        index, _, inner = stem.removeprefix("embedder.encoder.layer.").partition(".")
        return f"embedder.encoder.layers.{index}.{_ENCODER_NAMES[inner]}"
    owner, _, rest = stem.partition(".layers.")
    index, _, inner = rest.partition(".")
    prefix = owner.split(".")[0] if config.is_block else "vanilla"
    return f"{prefix}.layers.{index}.{_LAYER_NAMES[inner]}"


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest absolute expected value."""
    scale = expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float((actual - expected).abs().max() / scale)
