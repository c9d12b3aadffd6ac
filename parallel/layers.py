"""The transformer layer, built once from Megatron-core's parallel linear layers and used by every decoder stack.

GPT-NeoX: parallel residual, LayerNorm, exact GELU, rotary positions on a fraction of each head, fused query/key/value
rows laid out [head][query | key | value]. With sequence parallelism, tensors between layers are sharded along their
first dimension over the tensor-parallel group.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from parallel.config import DecoderConfig, ModelConfig


def _no_initialization(weight: Tensor) -> None:
    """Weights are set by parallel.initialization, by name, alike under every layout."""


def mark_split(weight: nn.Parameter, axis: int) -> None:
    """Marks a weight as split along an axis; Megatron-core does so only when it initializes the weight itself."""
    set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=axis, stride=1)


def column_parallel(inputs: int, outputs: int, megatron: TransformerConfig, bias: bool = True) -> ColumnParallelLinear:
    """Linear layer whose output features are split over the tensor-parallel group."""
    layer = ColumnParallelLinear(
        inputs,
        outputs,
        config=megatron,
        init_method=_no_initialization,
        bias=bias,
        gather_output=False,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
    )
    mark_split(layer.weight, axis=0)
    return layer


def row_parallel(inputs: int, outputs: int, megatron: TransformerConfig) -> RowParallelLinear:
    """Linear layer whose input features are split over the tensor-parallel group."""
    layer = RowParallelLinear(
        inputs,
        outputs,
        config=megatron,
        init_method=_no_initialization,
        bias=True,
        input_is_parallel=True,
        skip_bias_add=False,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
    )
    mark_split(layer.weight, axis=1)
    return layer


def mark_sequence_parallel(module: nn.Module, megatron: TransformerConfig) -> None:
    """Marks replicated parameters that see only this rank's rows: their gradients must be summed over TP."""
    for parameter in module.parameters(recurse=False):
        parameter.sequence_parallel = megatron.sequence_parallel  # type: ignore[attr-defined]


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last dimension, replicated over the tensor-parallel group."""

    def __init__(self, size: int, config: ModelConfig, megatron: TransformerConfig) -> None:
        super().__init__(size, eps=config.layer_norm_epsilon, dtype=megatron.params_dtype)
        mark_sequence_parallel(self, megatron)


@lru_cache(maxsize=16)
def rotary_tables(length: int, size: int, base: float, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Cosine and sine [length, size] of the rotary embedding (RoFormer, eq. 34), computed in fp32."""
    frequencies = base ** -(torch.arange(0, size, 2, dtype=torch.float32, device=device) / size)
    angles = torch.arange(length, dtype=torch.float32, device=device)[:, None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(states: Tensor, size: int, base: float) -> Tensor:
    """Rotates the first `size` values of each head of [..., length, head_size] by position 0..length-1."""
    cos, sin = rotary_tables(states.shape[-2], size, base, states.device, states.dtype)
    rotated, passed = states[..., :size], states[..., size:]
    first, second = rotated.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return torch.cat((rotated * cos + turned * sin, passed), dim=-1)


class SelfAttention(nn.Module):
    """Causal multi-head attention; heads are split over the tensor-parallel group."""

    def __init__(
        self, stack: DecoderConfig, config: ModelConfig, megatron: TransformerConfig, sequence_first: bool
    ) -> None:
        super().__init__()
        self.sequence_first = sequence_first
        self.num_local_heads = stack.num_attention_heads // parallel_state.get_tensor_model_parallel_world_size()
        self.rotary_size = int(stack.head_size * config.rotary_fraction)
        self.rotary_base = config.rotary_base
        self.query_key_value = column_parallel(stack.hidden_size, 3 * stack.hidden_size, megatron)
        self.dense = row_parallel(stack.hidden_size, stack.hidden_size, megatron)

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Attends within each sequence.

        Args:
            hidden: [length, batch, D] if sequence_first, else [batch, length, D]; the first dimension sharded under
                sequence parallelism.
            mask: bool [batch, 1, length, length], True = may attend; None = causal.
        """
        fused, _ = self.query_key_value(hidden)
        rows, columns, _ = fused.shape
        heads = fused.view(rows, columns, self.num_local_heads, -1)
        heads = heads.permute(1, 2, 0, 3) if self.sequence_first else heads.permute(0, 2, 1, 3)
        query, key, value = heads.chunk(3, dim=-1)
        if self.rotary_size:
            query = apply_rotary(query, self.rotary_size, self.rotary_base)
            key = apply_rotary(key, self.rotary_size, self.rotary_base)
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
        context = context.permute(2, 0, 1, 3) if self.sequence_first else context.permute(0, 2, 1, 3)
        output, _ = self.dense(context.reshape(rows, columns, -1))
        return output


class FeedForward(nn.Module):
    """Two linear layers with exact GELU between; the inner width is split over the tensor-parallel group."""

    def __init__(self, stack: DecoderConfig, megatron: TransformerConfig) -> None:
        super().__init__()
        self.expand = column_parallel(stack.hidden_size, stack.feed_forward_size, megatron)
        self.contract = row_parallel(stack.feed_forward_size, stack.hidden_size, megatron)

    def forward(self, hidden: Tensor) -> Tensor:
        """Maps [..., D] to [..., D]."""
        inner, _ = self.expand(hidden)
        output, _ = self.contract(F.gelu(inner))
        return output
