"""The transformer layer that the block decoder, the token decoder and the vanilla model are stacks of."""

from collections.abc import Callable

import torch
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from parallel.attention import CrossAttention, SelfAttention
from parallel.checkpointing import Policy, run_checkpointed
from parallel.config import ModelConfig
from parallel.feed_forward import FeedForward
from parallel.inputs import ModelInputs
from parallel.norms import build_norm


class DecoderLayer(nn.Module):
    """One layer: attention and feed-forward, each behind its norm, added to the hidden states.

    Args:
        config: the model.
        megatron: Megatron-core's settings.
        is_local: the layer is the token decoder's: attention inside each block.
        policy: what the forward pass keeps for the backward pass.
    """

    def __init__(self, config: ModelConfig, megatron: TransformerConfig, is_local: bool, policy: Policy) -> None:
        super().__init__()
        self.stack = config.tokens if is_local else config.blocks if config.is_block else config.vanilla
        backbone = config.backbone
        self.is_local = is_local
        self.policy = policy
        self.is_parallel = backbone.residual == "parallel"
        self.attention_norm = build_norm(self.stack.hidden_size, backbone, megatron)
        self.attention = SelfAttention(self.stack, backbone, megatron, sequence_first=not is_local)
        self.feed_forward_norm = build_norm(self.stack.hidden_size, backbone, megatron)
        self.feed_forward = FeedForward(self.stack, backbone, megatron)
        self.compiled: Callable[[Tensor, Tensor | None], Tensor] | None = None  # parallel/compilation.py

    def forward(self, hidden: Tensor, inputs: ModelInputs) -> Tensor:
        """Maps hidden states to hidden states of the same shape."""
        mask = inputs.local_mask if self.is_local else inputs.global_mask
        if not torch.is_grad_enabled():
            return self.transform(hidden, mask)
        if self.policy == "none":
            return (self.compiled or self.transform)(hidden, mask)
        row_parallel = [module.weight for module in self.modules() if isinstance(module, RowParallelLinear)]
        return run_checkpointed(self.transform, hidden, mask, self.policy == "selective", row_parallel)

    def transform(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """The layer itself, with nothing computed again."""
        attended: Tensor = self.attention(self.attention_norm(hidden), mask)
        return self._feed(hidden, hidden + attended)

    def _feed(self, layer_input: Tensor, attended: Tensor) -> Tensor:
        """Adds the feed-forward part to the hidden states after attention."""
        source = layer_input if self.is_parallel else attended
        transformed: Tensor = self.feed_forward(self.feed_forward_norm(source))
        return attended + transformed


class CrossAttentionLayer(DecoderLayer):
    """A token-decoder layer that also attends to the context vectors, which pass through behind the tokens.

    [rows, T + L, D] -> [rows, T + L, D]; the last L vectors stay as they are.
    """

    def __init__(self, config: ModelConfig, megatron: TransformerConfig, policy: Policy) -> None:
        super().__init__(config, megatron, is_local=True, policy=policy)
        self.num_context_vectors = config.num_context_vectors
        self.cross_attention_norm = build_norm(self.stack.hidden_size, config.backbone, megatron)
        self.cross_attention = CrossAttention(self.stack, config.backbone, megatron)

    def transform(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """See DecoderLayer.transform."""
        tokens, context = hidden[:, : -self.num_context_vectors], hidden[:, -self.num_context_vectors :]
        attended: Tensor = tokens + self.attention(self.attention_norm(tokens), mask)
        source = tokens if self.is_parallel else attended
        attended = attended + self.cross_attention(self.cross_attention_norm(source), context)
        return torch.cat((self._feed(tokens, attended), context), dim=1)
