"""What models of other formats compute, in plain torch on their own tensors and names: the other side of every check.

Nothing here shares code with our model, and tensors are read layer by layer, so that a large model needs the memory of
its largest tensors only. Everything is fp32, without padding. B sequences, S tokens, N blocks, L block length.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoints.weights.huggingface_config import GPT_NEOX, head_size_of, rotary_settings
from checkpoints.weights.reference_config import BACKBONE_FIELDS, block_length_of, heads_of, section_config
from checkpoints.weights.tensor_files import TensorFiles

ENCODER_EPSILON = 1e-5
ENCODER_PADDING_ID = 1
CLS_ID = 0
BEGIN_ID = 0


class Weights:
    """Tensors of one folder as the functions that apply them; nothing is kept."""

    def __init__(self, files: TensorFiles, device: torch.device) -> None:
        self.files = files
        self.device = device

    def __contains__(self, name: str) -> bool:
        return name in self.files.shapes

    def read(self, name: str) -> Tensor:
        """One tensor in fp32 on the device."""
        return self.files.read(name).to(self.device, torch.float32)

    def bias(self, name: str) -> Tensor | None:
        """The bias of a layer, None if it has none."""
        return self.read(f"{name}.bias") if f"{name}.bias" in self else None

    def linear(self, name: str, inputs: Tensor) -> Tensor:
        """A linear layer with or without bias."""
        return F.linear(inputs, self.read(f"{name}.weight"), self.bias(name))

    def layer_norm(self, name: str, inputs: Tensor, epsilon: float) -> Tensor:
        """A LayerNorm."""
        return F.layer_norm(inputs, inputs.shape[-1:], self.read(f"{name}.weight"), self.bias(name), epsilon)

    def rms_norm(self, name: str, inputs: Tensor, epsilon: float) -> Tensor:
        """An RMSNorm."""
        return inputs * (inputs.square().mean(-1, keepdim=True) + epsilon).rsqrt() * self.read(f"{name}.weight")

    def convolution(self, name: str, inputs: Tensor) -> Tensor:
        """A Conv1d over vectors [rows, positions, width] as long as its kernel: [rows, outputs]."""
        return F.conv1d(inputs.transpose(1, 2), self.read(f"{name}.weight"), self.bias(name)).squeeze(-1)


def huggingface_logits(files: TensorFiles, config: Mapping[str, Any], token_ids: Tensor) -> Tensor:
    """Logits [B, S, V] of a Hugging Face model for ids [B, S]."""
    weights = Weights(files, token_ids.device)
    if config["model_type"] == GPT_NEOX:
        hidden = F.embedding(token_ids, weights.read("gpt_neox.embed_in.weight"))
        rotary = rotary_settings(config)
        merged = dict(config) | {"rotary_pct": rotary.fraction, "rotary_emb_base": rotary.base}
        hidden = _neox_stack(weights, "gpt_neox", merged, int(config["num_attention_heads"]), hidden)
        table = "gpt_neox.embed_in" if config.get("tie_word_embeddings") else "embed_out"
    else:
        hidden = F.embedding(token_ids, weights.read("model.embed_tokens.weight"))
        for index in range(config["num_hidden_layers"]):
            hidden = _llama_layer(weights, f"model.layers.{index}", config, hidden)
        hidden = weights.rms_norm("model.norm", hidden, config.get("rms_norm_eps", 1e-6))
        table = "model.embed_tokens" if config.get("tie_word_embeddings") else "lm_head"
    return F.linear(hidden, weights.read(f"{table}.weight"))


def reference_logits(files: TensorFiles, config: Mapping[str, Any], token_ids: Tensor) -> Tensor:
    """Logits [B, N - 1, L, V] of a model of the reference code for ids [B, S]; the first block is never predicted."""
    weights = Weights(files, token_ids.device)
    length = block_length_of(config)
    blocks = token_ids.view(len(token_ids), -1, length)
    vectors = _reference_embedding(weights, config["embedder"], blocks)
    context = _reference_stack(weights, "block_decoder", config, vectors)[:, :-1].flatten(0, 1)
    targets = blocks[:, 1:].flatten(0, 1)
    width = int(section_config(config["token_decoder"])["hidden_size"])
    expanded = weights.convolution("token_decoder.expansion_layer", context[:, None]).view(len(context), -1, width)
    hidden = expanded
    if config["token_decoder"]["decoding_strategy"] == "summation":
        table = weights.read("token_decoder.gpt_neox.embed_in.weight")
        hidden = expanded + F.embedding(F.pad(targets[:, :-1], (1, 0), value=BEGIN_ID), table)
    elif length > 1:
        table = weights.read("token_decoder.gpt_neox.embed_in.weight")
        hidden = torch.cat((expanded, F.embedding(targets[:, :-1], table)), dim=1)
    hidden = _reference_stack(weights, "token_decoder", config, hidden)[:, -length:]
    logits = weights.linear("token_decoder.embed_out", hidden)
    return logits.view(len(blocks), -1, length, logits.shape[-1])


def _reference_stack(weights: Weights, name: str, config: Mapping[str, Any], hidden: Tensor) -> Tensor:
    section = config[name]
    settings = dict(BACKBONE_FIELDS) | dict(section_config(section))
    return _neox_stack(weights, f"{name}.gpt_neox", settings, heads_of(section), hidden)


def _reference_embedding(weights: Weights, section: Mapping[str, Any], blocks: Tensor) -> Tensor:
    """Ids [B, N, L] -> block embeddings [B, N, D]."""
    rows = blocks.flatten(0, 1)
    if section["cls"] == "lookup":
        vectors = F.embedding(rows, weights.read("embedder.embeddings.weight"))
    else:
        num_cls = (section.get("n_cls_tokens") or 3) if section["cls"] == "roberta_cls" else 0
        rows = F.pad(rows, (num_cls, 0), value=CLS_ID)
        vectors = _roberta(weights, section, rows)
        vectors = vectors[:, :num_cls] if num_cls else vectors
    if "embedder.projection_layer.weight" in weights:
        vectors = weights.convolution("embedder.projection_layer", vectors)
    return vectors.reshape(*blocks.shape[:2], -1)


def _roberta(weights: Weights, section: Mapping[str, Any], ids: Tensor) -> Tensor:
    """RoBERTa's outputs [rows, T, W] for ids [rows, T]; positions count the tokens that are not its padding id."""
    real = (ids != ENCODER_PADDING_ID).long()
    positions = real.cumsum(dim=1) * real + ENCODER_PADDING_ID
    stem = "embedder.embeddings"
    hidden = F.embedding(ids, weights.read(f"{stem}.word_embeddings.weight"))
    hidden = hidden + F.embedding(positions, weights.read(f"{stem}.position_embeddings.weight"))
    hidden = hidden + weights.read(f"{stem}.token_type_embeddings.weight")[0]
    hidden = weights.layer_norm(f"{stem}.LayerNorm", hidden, ENCODER_EPSILON)
    for index in range(section_config(section)["num_hidden_layers"]):
        layer = f"embedder.encoder.layer.{index}"
        parts = [weights.linear(f"{layer}.attention.self.{part}", hidden) for part in ("query", "key", "value")]
        query, key, value = (part.unflatten(-1, (heads_of(section), -1)).transpose(1, 2) for part in parts)
        attended = weights.linear(f"{layer}.attention.output.dense", _attend(query, key, value, causal=False))
        hidden = weights.layer_norm(f"{layer}.attention.output.LayerNorm", hidden + attended, ENCODER_EPSILON)
        inner = F.gelu(weights.linear(f"{layer}.intermediate.dense", hidden))
        fed = weights.linear(f"{layer}.output.dense", inner)
        hidden = weights.layer_norm(f"{layer}.output.LayerNorm", hidden + fed, ENCODER_EPSILON)
    return hidden


def _neox_stack(weights: Weights, name: str, config: Mapping[str, Any], heads: int, hidden: Tensor) -> Tensor:
    """GPT-NeoX layers and the final norm over [rows, length, D]."""
    epsilon, parallel = config.get("layer_norm_eps", 1e-5), config.get("use_parallel_residual", True)
    for index in range(config["num_hidden_layers"]):
        layer = f"{name}.layers.{index}"
        normed = weights.layer_norm(f"{layer}.input_layernorm", hidden, epsilon)
        fused = weights.linear(f"{layer}.attention.query_key_value", normed)
        query, key, value = fused.unflatten(-1, (heads, -1)).transpose(1, 2).chunk(3, dim=-1)
        size = int(query.shape[-1] * config["rotary_pct"])
        query, key = (_rotate(part, size, config["rotary_emb_base"]) for part in (query, key))
        attended = hidden + weights.linear(f"{layer}.attention.dense", _attend(query, key, value))
        source = hidden if parallel else attended
        normed = weights.layer_norm(f"{layer}.post_attention_layernorm", source, epsilon)
        inner = F.gelu(weights.linear(f"{layer}.mlp.dense_h_to_4h", normed))
        hidden = attended + weights.linear(f"{layer}.mlp.dense_4h_to_h", inner)
    return weights.layer_norm(f"{name}.final_layer_norm", hidden, epsilon)


def _llama_layer(weights: Weights, layer: str, config: Mapping[str, Any], hidden: Tensor) -> Tensor:
    """One layer of Llama, Mistral, Qwen2 or Qwen3 over [B, S, D]."""
    epsilon, size = config.get("rms_norm_eps", 1e-6), head_size_of(config)
    normed = weights.rms_norm(f"{layer}.input_layernorm", hidden, epsilon)
    parts = [weights.linear(f"{layer}.self_attn.{letter}_proj", normed) for letter in "qkv"]
    query, key, value = (part.unflatten(-1, (-1, size)).transpose(1, 2) for part in parts)
    if f"{layer}.self_attn.q_norm.weight" in weights:
        query = weights.rms_norm(f"{layer}.self_attn.q_norm", query, epsilon)
        key = weights.rms_norm(f"{layer}.self_attn.k_norm", key, epsilon)
    rotary = rotary_settings(config)
    query, key = (_rotate(part, int(size * rotary.fraction), rotary.base) for part in (query, key))
    group = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(group, dim=1) for part in (key, value))
    hidden = hidden + weights.linear(f"{layer}.self_attn.o_proj", _attend(query, key, value))
    normed = weights.rms_norm(f"{layer}.post_attention_layernorm", hidden, epsilon)
    gate = F.silu(weights.linear(f"{layer}.mlp.gate_proj", normed))
    return hidden + weights.linear(f"{layer}.mlp.down_proj", gate * weights.linear(f"{layer}.mlp.up_proj", normed))


def _rotate(states: Tensor, size: int, base: float) -> Tensor:
    """Rotates the first `size` values of each head of [rows, heads, length, head size] by their position."""
    half = size // 2
    exponents = torch.arange(half, device=states.device, dtype=torch.float32) / half
    angles = (
        torch.arange(states.shape[2], device=states.device, dtype=torch.float32)[:, None] / float(base) ** exponents
    )
    cos, sin = angles.cos(), angles.sin()
    first, second, rest = states.split([half, half, states.shape[-1] - size], dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def _attend(query: Tensor, key: Tensor, value: Tensor, causal: bool = True) -> Tensor:
    """Attention over [rows, heads, length, head size]; the heads are concatenated: [rows, length, D]."""
    scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    if causal:
        length = query.shape[2]
        future = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    return (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)
