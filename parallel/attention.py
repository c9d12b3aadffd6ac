"""Attention with the heads split over the tensor-parallel group: multi-head, grouped-query or multi-query."""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from parallel.attend import attend
from parallel.component_config import BackboneConfig, DecoderConfig
from parallel.linear import SharedRowsLinear, column_parallel, row_parallel
from parallel.norms import build_head_norm


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


def attention_weights(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax of scaled products, for looking into a model: training never holds this matrix.

    Args:
        query: [batch, heads, length, head_size].
        key: [batch, groups, keys, head_size]; each group serves as many consecutive heads.
        mask: bool, broadcast to the result, True = may attend; None: everything.

    Returns:
        fp32 [batch, heads, length, keys].
    """
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query.float() @ key.float().transpose(2, 3) / math.sqrt(query.shape[3])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(dim=-1)


class LocalHeads:
    """Which heads of a stack this tensor-parallel rank computes.

    Either each rank has whole groups of query heads with their key and value heads, or, with fewer groups than ranks,
    several ranks share a group: each has some of its queries, and all have its key and value head.

    Attributes:
        groups: key and value heads.
        queries: query heads of each of them.
        shares_group: the second case.
    """

    def __init__(self, stack: DecoderConfig, megatron: TransformerConfig) -> None:
        size = megatron.tensor_model_parallel_size
        self._stack = stack
        self._ranks_per_group = size // stack.key_value_heads
        self.shares_group = size > stack.key_value_heads
        self.groups = 1 if self.shares_group else stack.key_value_heads // size
        self.queries = stack.num_attention_heads // size // self.groups

    def fused(self, inputs: int, queries_per_group: int, megatron: TransformerConfig, bias: bool) -> nn.Module:
        """Layer to [group][queries_per_group query heads | key head | value head]; of these this rank's part."""
        group_size = (queries_per_group + 2) * self._stack.head_size
        outputs = self._stack.key_value_heads * group_size
        if not self.shares_group:
            return column_parallel(inputs, outputs, megatron, bias)
        group, part = divmod(parallel_state.get_tensor_model_parallel_rank(), self._ranks_per_group)
        local = self.queries if queries_per_group else 0
        heads = torch.arange(outputs).view(self._stack.key_value_heads, -1, self._stack.head_size)[group]
        rows = torch.cat((heads[part * local : (part + 1) * local], heads[queries_per_group:])).flatten()
        return SharedRowsLinear(inputs, outputs, rows, megatron, bias)


class SelfAttention(nn.Module):
    """Self-attention with rotary positions.

    The rows of the fused matrix are laid out [group][query heads | key head | value head], one group per key and value
    head; without grouping this is GPT-NeoX's layout.

    Args:
        stack: widths and heads.
        backbone: biases, rotary embedding, query and key norms.
        megatron: Megatron-core's settings.
        sequence_first: hidden states are [length, batch, D] instead of [batch, length, D].
    """

    def __init__(
        self, stack: DecoderConfig, backbone: BackboneConfig, megatron: TransformerConfig, sequence_first: bool
    ) -> None:
        super().__init__()
        self.sequence_first = sequence_first
        self.stack = stack
        self.local = LocalHeads(stack, megatron)
        self.rotary_size = int(stack.head_size * backbone.rotary_fraction)
        self.rotary_base = backbone.rotary_base
        self.query_key_value = self.local.fused(
            stack.hidden_size, stack.queries_per_group, megatron, bias=backbone.bias != "none"
        )
        self.dense = row_parallel(stack.attention_size, stack.hidden_size, megatron, bias=backbone.bias == "all")
        self.query_norm: nn.Module | None = None
        self.key_norm: nn.Module | None = None
        if backbone.query_key_norm:
            self.query_norm = build_head_norm(stack.head_size, backbone, megatron)
            self.key_norm = build_head_norm(stack.head_size, backbone, megatron)

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Attends within each sequence.

        Args:
            hidden: [length, batch, D] if sequence_first, else [batch, length, D]; the first dimension sharded under
                sequence parallelism.
            mask: bool, broadcast to [batch, heads, length, length], True = may attend; None = causal.
        """
        fused, _ = self.query_key_value(hidden)
        rows, columns, _ = fused.shape
        query, key, value = self._heads(fused)
        context = self._attend(query, key, value, mask)
        context = context.permute(2, 0, 1, 3) if self.sequence_first else context.permute(0, 2, 1, 3)
        output, _ = self.dense(context.reshape(rows, columns, -1))
        return output

    def weights(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """What each position takes from each other one, for looking into a model; arguments as those of forward.

        Returns:
            fp32 [batch, heads, length, length], of this rank's heads; rows sum to 1.
        """
        fused, _ = self.query_key_value(hidden)
        query, key, _ = self._heads(fused)
        if mask is None:
            mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
        return attention_weights(query, key, mask)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return attend(query, key, value, mask)

    def _heads(self, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query [batch, heads, length, head_size], key and value [batch, groups, length, head_size]."""
        rows, columns, _ = fused.shape
        queries = self.local.queries
        heads = fused.view(rows, columns, self.local.groups, queries + 2, self.stack.head_size)
        heads = heads.permute(1, 2, 3, 0, 4) if self.sequence_first else heads.permute(0, 2, 3, 1, 4)
        query, key, value = heads[:, :, :queries].flatten(1, 2), heads[:, :, queries], heads[:, :, queries + 1]
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.rotary_size:
            query = apply_rotary(query, self.rotary_size, self.rotary_base)
            key = apply_rotary(key, self.rotary_size, self.rotary_base)
        return query, key, value


class CrossAttention(nn.Module):
    """Attention from a block's tokens to its context vectors, without positions: each context vector has its own role.

    The rows of the key and value matrix are laid out [head][key | value].
    """

    def __init__(self, stack: DecoderConfig, backbone: BackboneConfig, megatron: TransformerConfig) -> None:
        super().__init__()
        self.stack = stack
        self.local = LocalHeads(stack, megatron)
        biases = backbone.bias != "none"
        self.query = column_parallel(stack.hidden_size, stack.attention_size, megatron, bias=biases)
        self.key_value = self.local.fused(stack.hidden_size, 0, megatron, bias=biases)
        self.dense = row_parallel(stack.attention_size, stack.hidden_size, megatron, bias=backbone.bias == "all")

    def forward(self, hidden: Tensor, context: Tensor) -> Tensor:
        """Tokens [batch, length, D] attend to all context vectors [batch, K, D] of their block."""
        query, key, value = self._heads(hidden, context)
        attended = F.scaled_dot_product_attention(query, key, value, enable_gqa=self.local.queries > 1)
        output, _ = self.dense(attended.transpose(1, 2).flatten(2))
        return output

    def weights(self, hidden: Tensor, context: Tensor) -> Tensor:
        """What each token takes from each context vector: fp32 [batch, heads, length, K]; see SelfAttention.weights."""
        query, key, _ = self._heads(hidden, context)
        return attention_weights(query, key, None)

    def _heads(self, hidden: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query [batch, heads, length, head_size], key and value [batch, groups, K, head_size]."""
        query, _ = self.query(hidden)
        key_value, _ = self.key_value(context)
        batch, length, _ = query.shape
        query = query.view(batch, length, -1, self.stack.head_size).transpose(1, 2)
        key_value = key_value.view(batch, key_value.shape[1], self.local.groups, -1).transpose(1, 2)
        key, value = key_value.chunk(2, dim=-1)
        return query, key, value
