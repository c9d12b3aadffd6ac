"""Initial weights, a pure function of (seed, parameter name): alike for every tensor, pipeline and data layout.

As the paper's reference code: matrices and tables N(0, 0.02), biases 0, norms 1 and 0; the expansion of context
embeddings and the embedder's projection N(0, inputs^-0.5), so that what they give starts at the scale of their input.
"""

import hashlib

import torch
from torch import Tensor, nn

from parallel.config import ModelConfig
from parallel.sharding import local_slice, parameter_shard


def initialize_weights(module: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fills every parameter of a stage in place with its slice of the global initial tensor.

    Args:
        module: a stage; its parameter names are global.
        config: the model.
        seed: same seed, same model.
    """
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            shard = parameter_shard(parameter)
            full = initial_tensor(name, shard.global_shape, config, seed)
            parameter.copy_(local_slice(full, shard))


def initial_tensor(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> Tensor:
    """The whole initial value of a parameter, fp32, by its global name and shape."""
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    std = config.initializer_std
    if name in ("token_decoder.input.expansion.weight", "embedder.projection.weight"):
        std = shape[1] ** -0.5
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)
