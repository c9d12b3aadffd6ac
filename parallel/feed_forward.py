"""The feed-forward part of a transformer layer; the inner width is split over the tensor-parallel group."""

import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from parallel.component_config import BackboneConfig, DecoderConfig
from parallel.linear import column_parallel, row_parallel


class FeedForward(nn.Module):
    """Two linear layers with exact GELU between, or three with a SiLU gate (SwiGLU)."""

    def __init__(self, stack: DecoderConfig, backbone: BackboneConfig, megatron: TransformerConfig) -> None:
        super().__init__()
        width, inner, bias = stack.hidden_size, stack.feed_forward_size, backbone.bias == "all"
        gated = backbone.feed_forward == "swiglu"
        self.gate = column_parallel(width, inner, megatron, bias) if gated else None
        self.expand = column_parallel(width, inner, megatron, bias)
        self.contract = row_parallel(inner, width, megatron, bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Maps [..., D] to [..., D]."""
        inner, _ = self.expand(hidden)
        if self.gate is None:
            inner = F.gelu(inner)
        else:
            gate, _ = self.gate(hidden)
            inner = F.silu(gate) * inner
        output, _ = self.contract(inner)
        return output
