"""The transformer layer of parallel/decoder_layer.py for a few new positions behind many cached ones.

B sequences (for a token decoder, one block of each), T new positions, D width.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inference.cpu_kernels.kernels import stack_kernel
from inference.dense import dense_of
from inference.kv_cache import KeyValueCache
from parallel.attention import CrossAttention, SelfAttention, rotary_tables
from parallel.decoder_layer import CrossAttentionLayer, DecoderLayer
from parallel.feed_forward import FeedForward


class Rotary:
    """The rotary embedding of the positions that come next, in place; all layers of a step share its tables."""

    def __init__(self, attention: SelfAttention) -> None:
        self.size = attention.rotary_size
        self._base = attention.rotary_base
        self._cosine: Tensor
        self._sine: Tensor
        self._here: tuple[Tensor, Tensor]

    def start(self, capacity: int, device: torch.device, dtype: torch.dtype) -> None:
        """Makes tables [capacity, 1, 1, size]; the sine with the sign that the other half has in each half."""
        cosine, sine = rotary_tables(capacity, self.size, self._base, device, dtype)
        half = self.size // 2
        self._cosine, self._sine = (
            cosine[:, None, None],
            torch.cat((-sine[:, :half], sine[:, half:]), dim=1)[:, None, None],
        )

    def move_to(self, cache: KeyValueCache, count: int) -> None:
        """Chooses the positions that come next in a cache."""
        if cache.position is not None:
            self._here = self._cosine.index_select(0, cache.position), self._sine.index_select(0, cache.position)
        else:
            self._here = self._cosine.narrow(0, cache.length, count), self._sine.narrow(0, cache.length, count)

    @property
    def tables(self) -> tuple[Tensor, Tensor]:
        """Cosine and sine [capacity, 1, 1, size] of all positions."""
        return self._cosine, self._sine

    def rotate_(self, heads: Tensor) -> None:
        """Rotates [B, positions, groups, heads, head size] in place."""
        rotated = heads[..., : self.size]
        turned = rotated.roll(self.size // 2, -1)
        cosine, sine = self._here
        rotated.mul_(cosine).addcmul_(turned, sine)


class CachedSelfAttention:
    """Self-attention of new positions to all positions so far."""

    def __init__(self, attention: SelfAttention, index: int) -> None:
        self._index = index
        self._groups, self._queries = attention.local.groups, attention.local.queries
        self._head_size = attention.stack.head_size
        self._fused = dense_of(attention.query_key_value)
        self._dense = dense_of(attention.dense, sums_parts=True)
        self._query_norm, self._key_norm = attention.query_norm, attention.key_norm

    def __call__(self, hidden: Tensor, cache: KeyValueCache, rotary: Rotary, mask: Tensor | None) -> Tensor:
        """Attends.

        Args:
            hidden: [B, T, D].
            cache: receives the new positions.
            rotary: at the new positions.
            mask: bool, broadcast to [B, heads, T, all positions]; None: causal.
        """
        rows, new, width = hidden.shape
        fused = self._fused(hidden.view(rows * new, width))
        heads = fused.view(rows, new, self._groups, self._queries + 2, self._head_size)
        self._normalize_(heads)
        if rotary.size:
            rotary.rotate_(heads[..., : self._queries + 1, :])
        keys, values = cache.append(self._index, heads[..., self._queries :, :].permute(3, 0, 2, 1, 4))
        # One new position sees all; several at the very beginning see what is before them.
        context = F.scaled_dot_product_attention(
            heads[..., : self._queries, :].flatten(2, 3).transpose(1, 2),
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None and new > 1,
            enable_gqa=self._queries > 1,
        )
        return self._dense(context.transpose(1, 2).reshape(rows * new, -1)).view(rows, new, -1)

    def _normalize_(self, heads: Tensor) -> None:
        if self._query_norm is not None and self._key_norm is not None:
            query, key = heads[..., : self._queries, :], heads[..., self._queries, :]
            query.copy_(self._query_norm(query))
            key.copy_(self._key_norm(key))


class CachedCrossAttention:
    """Attention of new positions to the context vectors of their block, whose keys and values are made once."""

    def __init__(self, attention: CrossAttention) -> None:
        self._groups, self._queries = attention.local.groups, attention.local.queries
        self._head_size = attention.stack.head_size
        self._query = dense_of(attention.query)
        self._key_value = dense_of(attention.key_value)
        self._dense = dense_of(attention.dense, sums_parts=True)
        self._keys: Tensor
        self._values: Tensor

    def start_block(self, context: Tensor) -> None:
        """Takes the context vectors [B, K, D] of the next block."""
        rows, count, width = context.shape
        fused = self._key_value(context.reshape(rows * count, width))
        heads = fused.view(rows, count, self._groups, 2, self._head_size).permute(3, 0, 2, 1, 4)
        self._keys, self._values = heads[0], heads[1]

    def __call__(self, hidden: Tensor) -> Tensor:
        """Attends from [B, T, D]."""
        rows, new, width = hidden.shape
        query = self._query(hidden.reshape(rows * new, width)).view(rows, new, -1, self._head_size).transpose(1, 2)
        context = F.scaled_dot_product_attention(query, self._keys, self._values, enable_gqa=self._queries > 1)
        return self._dense(context.transpose(1, 2).reshape(rows * new, -1)).view(rows, new, -1)


class CachedFeedForward:
    """The feed-forward part, on rows."""

    def __init__(self, module: FeedForward) -> None:
        self._gate = None if module.gate is None else dense_of(module.gate)
        self._expand = dense_of(module.expand)
        self._contract = dense_of(module.contract, sums_parts=True)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Maps [B, T, D] to the same."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        inner = self._expand(rows)
        inner = F.gelu(inner) if self._gate is None else F.silu(self._gate(rows)).mul_(inner)
        return self._contract(inner).view(hidden.shape)


class CachedLayer:
    """One layer; see parallel.decoder_layer for what it computes."""

    def __init__(self, layer: DecoderLayer, index: int) -> None:
        self._is_parallel = layer.is_parallel
        self._attention_norm, self._feed_forward_norm = layer.attention_norm, layer.feed_forward_norm
        self._attention: Callable[..., Tensor] = CachedSelfAttention(layer.attention, index)
        self._feed_forward: Callable[[Tensor], Tensor] = CachedFeedForward(layer.feed_forward)
        self._cross_attention: CachedCrossAttention | None = None
        if isinstance(layer, CrossAttentionLayer):
            self._cross_attention_norm = layer.cross_attention_norm
            self._cross_attention = CachedCrossAttention(layer.cross_attention)

    def start_block(self, context: Tensor) -> None:
        """Takes the context vectors [B, K, D] of the next block, if the layer reads any."""
        if self._cross_attention is not None:
            self._cross_attention.start_block(context)

    def instrument(self, name: str, wrap: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> None:
        """See CachedStack."""
        self._attention = wrap(f"{name}, attention", self._attention)
        self._feed_forward = wrap(f"{name}, feed-forward", self._feed_forward)

    def __call__(self, hidden: Tensor, cache: KeyValueCache, rotary: Rotary, mask: Tensor | None) -> Tensor:
        """Maps new positions [B, T, D] to the same."""
        attended = hidden + self._attention(self._attention_norm(hidden), cache, rotary, mask)
        if self._cross_attention is not None:
            source = hidden if self._is_parallel else attended
            attended = attended + self._cross_attention(self._cross_attention_norm(source))
        source = hidden if self._is_parallel else attended
        return attended.add_(self._feed_forward(self._feed_forward_norm(source)))


class CachedStack:
    """The layers of one decoder and their cache; computed by a C++ kernel where there is one for them."""

    def __init__(self, layers: list[DecoderLayer]) -> None:
        self._modules = layers
        kernel = stack_kernel(layers)
        self._prepare = None if kernel is None else kernel.prepare
        self._kernel: Callable[..., Tensor] | None = kernel
        attention = layers[0].attention
        self._shape = (len(layers), attention.local.groups, attention.stack.head_size)
        weight = layers[0].attention_norm.get_parameter("weight")
        self._dtype, self._device = weight.dtype, weight.device
        self._rotary = Rotary(attention)
        self.cache = self._new_cache(0, 0)

    @cached_property
    def _layers(self) -> list[CachedLayer]:
        return [CachedLayer(layer, index) for index, layer in enumerate(self._modules)]

    def start(self, num_sequences: int, capacity: int) -> None:
        """Takes memory for so many sequences and positions."""
        self.cache = self._new_cache(num_sequences, capacity)
        if self._prepare is not None:
            self._prepare(self.cache.memory)
        self._rotary.start(capacity, self._device, self._dtype)

    def instrument(self, name: str, wrap: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> None:
        """Puts a wrapper around the kernel, or around attention and feed-forward parts, under the name of the stack."""
        if self._kernel is not None:
            self._kernel = wrap(name, self._kernel)
            return
        for layer in self._layers:
            layer.instrument(name, wrap)

    def start_block(self, context: Tensor) -> None:
        """Takes the context vectors [B, K, D] of the next block."""
        for layer in self._layers:
            layer.start_block(context)

    def __call__(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Runs new positions [B, T, D] through all layers, and remembers them; returns the last ones [B, D]."""
        cache, positions = self.cache, hidden.shape[1]
        if self._kernel is not None and cache.position is None:
            last = self._kernel(hidden, cache.memory, cache.length, self._rotary.tables, mask)
        else:
            self._rotary.move_to(cache, positions)
            for layer in self._layers:
                hidden = layer(hidden, cache, self._rotary, mask)
            last = hidden[:, -1]
        cache.advance(positions)
        return last

    def _new_cache(self, num_sequences: int, capacity: int) -> KeyValueCache:
        return KeyValueCache(*self._shape, num_sequences, capacity, self._dtype, self._device)
