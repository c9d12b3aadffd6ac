"""A RoBERTa encoder over the tokens of each block (paper appendix F.1): post-norm, absolute positions, both directions.

Rows are blocks, N * B of them, sharded over the tensor-parallel group under sequence parallelism.
"""

import torch
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from parallel.attention import SelfAttention
from parallel.component_config import BackboneConfig, DecoderConfig, EncoderConfig
from parallel.feed_forward import FeedForward
from parallel.linear import TokenEmbedding, local_rows, mark_partial_gradient
from parallel.norms import build_norm

PADDING_ID = 1  # RoBERTa's: it counts positions from the id after it, and does not count padding
BACKBONE = BackboneConfig(rotary_fraction=0.0)


class Dropout:
    """Dropout whose masks are a function of the micro-batch's tokens, so that no generator state need be saved.

    Under tensor parallelism all ranks draw alike; under sequence parallelism each for its own rows.
    """

    def __init__(self, rate: float, token_ids: Tensor, rank: int) -> None:
        self.rate = rate
        weights = torch.arange(1, token_ids.numel() + 1, device=token_ids.device)
        seed = int((token_ids.flatten() * weights).sum()) * 1009 + rank
        self.generator = torch.Generator(token_ids.device).manual_seed(seed % 2**63)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Zeroes values at the given rate and scales the others up."""
        drawn = torch.rand(hidden.shape, generator=self.generator, device=hidden.device)
        return hidden * (drawn >= self.rate).to(hidden.dtype) / (1.0 - self.rate)


def _positions(ids: Tensor) -> Tensor:
    """Position of each token [rows, T] in its block; the first is 2."""
    counted = (ids != PADDING_ID).long()
    return counted.cumsum(dim=1) * counted + PADDING_ID


def _keep(hidden: Tensor) -> Tensor:
    return hidden


class EncoderAttention(SelfAttention):
    """Attention in both directions; its mask [rows, 1, 1, T] is True where a key is real.

    As in the reference, a block of nothing but padding attends evenly to all of itself. Written out, because the
    gradients of fused kernels are wrong there: they rebuild the probabilities from a rounded normalizer.
    """

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        assert mask is not None
        scores = query @ key.transpose(-1, -2) * self.stack.head_size**-0.5
        scores = scores + torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, torch.finfo(scores.dtype).min)
        return scores.softmax(dim=-1) @ value


class EncoderLayer(nn.Module):
    """Attention and feed-forward, each followed by its norm."""

    def __init__(self, stack: DecoderConfig, megatron: TransformerConfig) -> None:
        super().__init__()
        self.attention = EncoderAttention(stack, BACKBONE, megatron, sequence_first=False)
        self.attention_norm = build_norm(stack.hidden_size, BACKBONE, megatron)
        self.feed_forward = FeedForward(stack, BACKBONE, megatron)
        self.feed_forward_norm = build_norm(stack.hidden_size, BACKBONE, megatron)

    def forward(self, hidden: Tensor, mask: Tensor, dropout: Dropout | None) -> Tensor:
        """[rows, T, W] -> [rows, T, W]; mask bool [all rows, 1, 1, T]."""
        drop = dropout or _keep
        attended: Tensor = self.attention_norm(hidden + drop(self.attention(hidden, mask)))
        transformed: Tensor = self.feed_forward_norm(attended + drop(self.feed_forward(attended)))
        return transformed


class RobertaEncoder(nn.Module):
    """Embeddings of word, position and (the one) token type, then the layers."""

    def __init__(self, encoder: EncoderConfig, vocab_size: int, megatron: TransformerConfig) -> None:
        super().__init__()
        width = encoder.hidden_size
        self.megatron = megatron
        self.dropout_rate = encoder.dropout
        self.word_embedding = TokenEmbedding(vocab_size, width, megatron)
        self.position_embedding = nn.Embedding(encoder.max_positions, width, dtype=megatron.params_dtype)
        self.token_type_embedding = nn.Embedding(1, width, dtype=megatron.params_dtype)
        for table in (self.position_embedding, self.token_type_embedding):
            mark_partial_gradient(table, megatron.sequence_parallel)
        self.norm = build_norm(width, BACKBONE, megatron)
        stack = encoder.stack
        self.layers = nn.ModuleList(EncoderLayer(stack, megatron) for _ in range(encoder.num_layers))

    def forward(self, ids: Tensor, valid: Tensor) -> Tensor:
        """Encodes each row on its own.

        Args:
            ids: int64 [rows, T].
            valid: bool [rows, T], False marks padding.

        Returns:
            [rows, T, W], this rank's rows.
        """
        dropout = self._dropout(ids)
        positions = local_rows(_positions(ids), self.megatron)
        places = self.position_embedding(positions) + self.token_type_embedding(torch.zeros_like(positions))
        hidden = self.norm(self.word_embedding(ids) + places)
        hidden = dropout(hidden) if dropout else hidden
        mask = valid[:, None, None, :]
        for layer in self.layers:
            hidden = layer(hidden, mask, dropout)
        return hidden

    def _dropout(self, ids: Tensor) -> Dropout | None:
        if not (self.training and self.dropout_rate and torch.is_grad_enabled()):
            return None
        rank = parallel_state.get_tensor_model_parallel_rank() if self.megatron.sequence_parallel else 0
        return Dropout(self.dropout_rate, ids, rank)
