"""Small random models whose greedy text is not trivial."""

from typing import Any, Literal

import torch
from torch import Tensor

from parallel.component_config import DecoderConfig
from parallel.config import ModelConfig, ParallelConfig
from parallel.inputs import MicroBatch
from parallel.stage import Stage, build_stage

VOCAB_SIZE = 48
PAD_ID = 7


def small_config(architecture: Literal["block", "vanilla"] = "block", length: int = 4, prefix: int = 2) -> ModelConfig:
    """Unequal widths in the two decoders; initial weights large enough for logits that differ."""
    wide = DecoderConfig(num_layers=2, hidden_size=32, num_attention_heads=4)
    narrow = DecoderConfig(num_layers=1, hidden_size=16, num_attention_heads=2)
    shape: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "sequence_length": 32, "initializer_std": 0.6}
    if architecture == "vanilla":
        return ModelConfig(architecture="vanilla", decoder=wide, **shape)
    return ModelConfig(block_length=length, prefix_length=prefix, block_decoder=wide, token_decoder=narrow, **shape)


def small_stage(config: ModelConfig) -> Stage:
    """The unsharded model with initial weights."""
    return build_stage(config, ParallelConfig(), seed=1)


def random_prompt(length: int, seed: int = 0) -> list[int]:
    """Token ids of a prompt."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist()


def forward_logits(stage: Stage, prompt: list[int], tokens: list[int]) -> Tensor:
    """Logits [len(tokens), V] of each new token by one training forward pass over prompt and tokens."""
    config = stage.model_config
    unit = config.unit_length
    left = -len(prompt) % unit
    right = -len(tokens) % unit
    ids = torch.tensor([[PAD_ID] * left + prompt + tokens + [PAD_ID] * right])
    mask = torch.tensor([[False] * left + [True] * (len(prompt) + len(tokens)) + [False] * right])
    with torch.no_grad():
        logits = stage.logits(MicroBatch(ids, mask)).reshape(ids.shape[1], -1)
    first = left + len(prompt) - unit  # row i * L + j predicts token j of block i + 1
    return logits[first : first + len(tokens)]
