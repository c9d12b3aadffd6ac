"""Scaled dot-product attention by the fastest exact method there is for the device and the length."""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

# Up to this length, plain products and a softmax are faster on CPU than torch's fused kernel, which pads queries to
# blocks of 32: forward and backward of 4,096 heads of 5 positions take 10 ms instead of 74 on two cores, of 2,048 heads
# of 17 positions 16 instead of 56.
SHORT = 32


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of each query head to its group's keys and values.

    Args:
        query: [batch, heads, length, head size].
        key: [batch, groups, length, head size]; a group serves as many consecutive heads.
        value: as key.
        mask: bool, broadcast to [batch, heads, length, length], True = may attend; None = causal. Every query may
            attend to something, as parallel/inputs.py sees to.

    Returns:
        [batch, heads, length, head size].
    """
    queries_per_group = query.shape[1] // key.shape[1]
    if query.device.type != "cpu" or query.dtype is not torch.float32 or query.shape[2] > SHORT:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=queries_per_group > 1
        )
    if queries_per_group > 1:
        key, value = (heads.repeat_interleave(queries_per_group, dim=1) for heads in (key, value))
    scores = (query * (1 / math.sqrt(query.shape[3]))) @ key.transpose(2, 3)
    scores = scores + _causal_bias(query.shape[2]) if mask is None else scores.masked_fill(~mask, -math.inf)
    return scores.softmax(dim=3) @ value


@lru_cache(maxsize=SHORT)
def _causal_bias(length: int) -> Tensor:
    """[length, length], minus infinity above the diagonal."""
    return torch.full((length, length), -math.inf).triu(1)
