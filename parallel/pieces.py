"""The model as a flat list of pieces; a pipeline stage is a contiguous slice of it.

Each piece maps hidden states to hidden states (the first reads token ids, the last returns the loss per token).
Shapes, B sequences, N blocks, L block length, P prefix length, T = P + L - 1, D the width of the stack:
    after the embedder and in the block decoder   [N, B, D]
    in the token decoder                          [N * B, T, D]
    in the vanilla decoder                        [S, B, D]
With sequence parallelism, the first dimension is divided by the tensor-parallel size.
"""

from collections.abc import Callable

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    VocabParallelEmbedding,
    gather_from_tensor_model_parallel_region,
    vocab_parallel_cross_entropy,
)
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from parallel.config import ModelConfig
from parallel.inputs import ModelInputs
from parallel.layers import FeedForward, LayerNorm, SelfAttention, column_parallel, mark_sequence_parallel, mark_split


class TokenEmbedding(VocabParallelEmbedding):
    """Embedding table split over the vocabulary; looks rows of ids up as [rows, columns, width]."""

    def __init__(self, vocab_size: int, width: int, megatron: TransformerConfig) -> None:
        super().__init__(
            vocab_size,
            width,
            init_method=lambda weight: None,
            reduce_scatter_embeddings=megatron.sequence_parallel,
            config=megatron,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
        )
        mark_split(self.weight, axis=0)

    def forward(self, ids: Tensor) -> Tensor:
        """Looks ids [rows, columns] up; rows are scattered over TP under sequence parallelism."""
        # Megatron-core's reduce-scatter transposes [columns, rows] into rows first; its all-reduce does not.
        return super().forward(ids.t().contiguous() if self.reduce_scatter_embeddings else ids)


class Embedder(nn.Module):
    """Lookup embedder (paper section 2.2): the embeddings of a block's tokens, concatenated."""

    def __init__(self, config: ModelConfig, megatron: TransformerConfig) -> None:
        super().__init__()
        self.embedding = TokenEmbedding(config.vocab_size, config.blocks.hidden_size // config.block_length, megatron)

    def forward(self, hidden: Tensor | None, inputs: ModelInputs) -> Tensor:
        """Ids [B, N, L] -> block embeddings [N, B, D]."""
        num_sequences, num_blocks, _ = inputs.token_ids.shape
        ids = inputs.token_ids.permute(1, 0, 2).reshape(num_blocks, -1)
        embedded = self.embedding(ids)
        return embedded.reshape(embedded.shape[0], num_sequences, -1)


class VanillaInput(nn.Module):
    """Token embeddings of the vanilla baseline."""

    def __init__(self, config: ModelConfig, megatron: TransformerConfig) -> None:
        super().__init__()
        self.embedding = TokenEmbedding(config.vocab_size, config.vanilla.hidden_size, megatron)

    def forward(self, hidden: Tensor | None, inputs: ModelInputs) -> Tensor:
        """Ids [B, S] -> [S, B, D]."""
        embedded: Tensor = self.embedding(inputs.token_ids.t())
        return embedded


class DecoderLayer(nn.Module):
    """One GPT-NeoX layer: hidden + attention(norm(hidden)) + feed_forward(norm(hidden)).

    Args:
        config: the model.
        megatron: Megatron-core's settings.
        is_local: the layer is the token decoder's: attention inside each block.
        recompute: activation checkpointing: keep only the input and recompute the rest in backward.
    """

    def __init__(self, config: ModelConfig, megatron: TransformerConfig, is_local: bool, recompute: bool) -> None:
        super().__init__()
        stack = config.tokens if is_local else config.blocks if config.is_block else config.vanilla
        self.is_local = is_local
        self.recompute = recompute
        self.attention_norm = LayerNorm(stack.hidden_size, config, megatron)
        self.feed_forward_norm = LayerNorm(stack.hidden_size, config, megatron)
        self.attention = SelfAttention(stack, config, megatron, sequence_first=not is_local)
        self.feed_forward = FeedForward(stack, megatron)

    def forward(self, hidden: Tensor, inputs: ModelInputs) -> Tensor:
        """Maps hidden states to hidden states of the same shape."""
        mask = inputs.local_mask if self.is_local else inputs.global_mask
        if self.recompute and torch.is_grad_enabled():
            recomputed: Tensor = checkpoint(
                self._transform, hidden, mask, use_reentrant=False, preserve_rng_state=False
            )
            return recomputed
        return self._transform(hidden, mask)

    def _transform(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        attended: Tensor = self.attention(self.attention_norm(hidden), mask)
        transformed: Tensor = self.feed_forward(self.feed_forward_norm(hidden))
        return hidden + attended + transformed


class BlockOutput(nn.Module):
    """Final LayerNorm of the block decoder; what it returns are the context embeddings."""

    def __init__(self, config: ModelConfig, megatron: TransformerConfig) -> None:
        super().__init__()
        self.norm = LayerNorm(config.blocks.hidden_size, config, megatron)

    def forward(self, hidden: Tensor, inputs: ModelInputs) -> Tensor:
        """[N, B, D] -> context embeddings [N, B, D]."""
        context: Tensor = self.norm(hidden)
        return context


class PrefixInput(nn.Module):
    """Token decoder input (paper section 2.4): the context embedding as P prefix vectors, then the block's tokens."""

    def __init__(self, config: ModelConfig, megatron: TransformerConfig) -> None:
        super().__init__()
        width = config.tokens.hidden_size
        self.prefix_length = config.prefix_length
        self.expansion = nn.Linear(config.blocks.hidden_size, config.prefix_length * width, dtype=megatron.params_dtype)
        mark_sequence_parallel(self.expansion, megatron)
        # The last token of a block is never an input, so with one token per block there is nothing to look up.
        self.embedding = TokenEmbedding(config.vocab_size, width, megatron) if config.block_length > 1 else None

    def forward(self, hidden: Tensor, inputs: ModelInputs) -> Tensor:
        """Context embeddings [N, B, D] and targets [N * B, L] -> [N * B, P + L - 1, D]."""
        prefix = self.expansion(hidden)
        prefix = prefix.view(prefix.shape[0] * prefix.shape[1], self.prefix_length, -1)
        if self.embedding is None:
            return prefix
        return torch.cat((prefix, self.embedding(inputs.targets[:, :-1])), dim=1)


class OutputHead(nn.Module):
    """Final LayerNorm, head over the vocabulary and cross entropy."""

    def __init__(self, config: ModelConfig, megatron: TransformerConfig) -> None:
        super().__init__()
        width = (config.tokens if config.is_block else config.vanilla).hidden_size
        self.first_output = config.prefix_length - 1 if config.is_block else 0
        self.norm = LayerNorm(width, config, megatron)
        self.head = column_parallel(width, config.vocab_size, megatron, bias=False)

    def forward(self, hidden: Tensor, inputs: ModelInputs) -> Tensor:
        """Hidden states -> cross entropy per target, fp32, shape of inputs.targets."""
        return vocab_parallel_cross_entropy(self._local_logits(self._predicting(hidden)).float(), inputs.targets)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states -> logits over the whole vocabulary, [N * B, L, V] or [S, B, V]."""
        return self.logits_of(self._predicting(hidden))

    def logits_of(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] over the whole vocabulary of chosen positions [..., D], prefix or not."""
        return gather_from_tensor_model_parallel_region(
            self._local_logits(hidden), group=parallel_state.get_tensor_model_parallel_group()
        )

    def _predicting(self, hidden: Tensor) -> Tensor:
        # The last prefix position predicts the block's first token; vanilla keeps every position.
        return hidden[:, self.first_output :]

    def _local_logits(self, hidden: Tensor) -> Tensor:
        logits, _ = self.head(self.norm(hidden))
        return logits


def build_piece(name: str, config: ModelConfig, megatron: TransformerConfig, recompute: bool) -> nn.Module:
    """Builds one piece by name; weights are left uninitialized.

    Args:
        name: one of piece_names(config).
        config: the model.
        megatron: Megatron-core's settings of the parallel layers.
        recompute: activation checkpointing of decoder layers.
    """
    if ".layers." in name:
        return DecoderLayer(config, megatron, name.startswith("token_decoder"), recompute)
    pieces: dict[str, Callable[[ModelConfig, TransformerConfig], nn.Module]] = {
        "embedder": Embedder,
        "vanilla.input": VanillaInput,
        "block_decoder.output": BlockOutput,
        "token_decoder.input": PrefixInput,
        "token_decoder.output": OutputHead,
        "vanilla.output": OutputHead,
    }
    return pieces[name](config, megatron)
