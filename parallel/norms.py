"""LayerNorm and RMSNorm, replicated over the tensor-parallel group."""

from megatron.core.transformer import TransformerConfig
from torch import nn

from parallel.component_config import BackboneConfig
from parallel.linear import mark_partial_gradient


def build_norm(size: int, backbone: BackboneConfig, megatron: TransformerConfig) -> nn.Module:
    """The backbone's norm over the last dimension of the residual stream."""
    kind = nn.LayerNorm if backbone.norm == "layer_norm" else nn.RMSNorm
    norm = kind(size, eps=backbone.norm_epsilon, dtype=megatron.params_dtype)
    mark_partial_gradient(norm, megatron.sequence_parallel)
    return norm


def build_head_norm(size: int, backbone: BackboneConfig, megatron: TransformerConfig) -> nn.RMSNorm:
    """RMSNorm over each query or key head; every tensor-parallel rank normalizes other heads with the same scale."""
    norm = nn.RMSNorm(size, eps=backbone.norm_epsilon, dtype=megatron.params_dtype)
    mark_partial_gradient(norm, megatron.tensor_model_parallel_size > 1)
    return norm
