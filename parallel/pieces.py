"""The model as a flat list of pieces; a pipeline stage is a contiguous slice of it.

Each piece maps hidden states to hidden states (the first reads token ids, the last returns the loss per token).
Shapes, B sequences, N blocks, T positions and vectors of a block (ModelConfig.carried_length), D the stack's width:
    after the embedder and in the block decoder   [N, B, D]
    in the token decoder                          [N * B, T, D]
    in the vanilla decoder                        [S, B, D]
With sequence parallelism, the first dimension is divided by the tensor-parallel size.
"""

from collections.abc import Callable

import torch
import torch.distributed
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region, vocab_parallel_cross_entropy
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from parallel.config import ModelConfig
from parallel.decoder_layer import CrossAttentionLayer, DecoderLayer
from parallel.embedders import build_embedder
from parallel.inputs import ModelInputs
from parallel.linear import TokenEmbedding, column_parallel
from parallel.norms import build_norm
from parallel.token_inputs import build_token_input


class VanillaInput(nn.Module):
    """Token embeddings of the vanilla baseline."""

    def __init__(self, config: ModelConfig, megatron: TransformerConfig) -> None:
        super().__init__()
        self.embedding = TokenEmbedding(config.vocab_size, config.vanilla.hidden_size, megatron)

    def forward(self, hidden: Tensor | None, inputs: ModelInputs) -> Tensor:
        """Ids [B, S] -> [S, B, D]."""
        embedded: Tensor = self.embedding(inputs.token_ids.t())
        return embedded


class BlockOutput(nn.Module):
    """Final norm of the block decoder; what it returns are the context embeddings."""

    def __init__(self, config: ModelConfig, megatron: TransformerConfig) -> None:
        super().__init__()
        self.norm = build_norm(config.blocks.hidden_size, config.backbone, megatron)

    def forward(self, hidden: Tensor, inputs: ModelInputs) -> Tensor:
        """[N, B, D] -> context embeddings [N, B, D]."""
        context: Tensor = self.norm(hidden)
        return context


class OutputHead(nn.Module):
    """Final norm, head over the vocabulary and cross entropy."""

    def __init__(self, config: ModelConfig, megatron: TransformerConfig) -> None:
        super().__init__()
        width = config.stacks[-1].hidden_size
        # The last leading position predicts the block's first token; vanilla keeps every position.
        first = config.leading_positions - 1
        self.predicting = slice(first, first + config.block_length) if config.is_block else slice(None)
        self.norm = build_norm(width, config.backbone, megatron)
        self.head = column_parallel(
            width, config.vocab_size, megatron, bias=False, own_weight=not config.tie_word_embeddings
        )

    def forward(self, hidden: Tensor, inputs: ModelInputs) -> Tensor:
        """Hidden states -> cross entropy per target, fp32, shape of inputs.targets.

        With inputs.scores_greedy it comes first of two, [2, ...]; second whether the target is the most likely token.
        """
        logits = self._local_logits(hidden[:, self.predicting]).float()
        if not inputs.scores_greedy:
            return vocab_parallel_cross_entropy(logits, inputs.targets)
        # First, because the cross entropy overwrites the logits.
        is_greedy = most_likely(logits) == inputs.targets
        return torch.stack((vocab_parallel_cross_entropy(logits, inputs.targets), is_greedy.float()))

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states -> logits over the whole vocabulary, [N * B, L, V] or [S, B, V]."""
        return self.logits_of(hidden[:, self.predicting])

    def logits_of(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] over the whole vocabulary of chosen positions [..., D]."""
        return gather_from_tensor_model_parallel_region(
            self._local_logits(hidden), group=parallel_state.get_tensor_model_parallel_group()
        )

    def _local_logits(self, hidden: Tensor) -> Tensor:
        logits, _ = self.head(self.norm(hidden))
        return logits


def most_likely(logits: Tensor) -> Tensor:
    """Ids of the largest logits, the first of equal ones, as argmax over the whole vocabulary gives them.

    Args:
        logits: [..., V / TP], this tensor-parallel rank's part of the vocabulary.

    Returns:
        int64 [...], the same on all tensor-parallel ranks.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    largest, ids = logits.max(dim=-1)
    ids += parallel_state.get_tensor_model_parallel_rank() * logits.shape[-1]
    overall = largest.clone()
    torch.distributed.all_reduce(overall, torch.distributed.ReduceOp.MAX, group=group)
    ids = torch.where(largest == overall, ids, torch.iinfo(torch.int64).max)
    torch.distributed.all_reduce(ids, torch.distributed.ReduceOp.MIN, group=group)
    return ids


def tie_head(output: nn.Module, table: nn.Module) -> None:
    """Makes the head's weight the embedding table of an input piece on the same stage."""
    assert isinstance(output, OutputHead)
    output.head.weight = table.get_parameter("embedding.weight")


def build_piece(name: str, config: ModelConfig, megatron: TransformerConfig, recompute: bool) -> nn.Module:
    """Builds one piece by name; weights are left uninitialized.

    Args:
        name: one of piece_names(config).
        config: the model.
        megatron: Megatron-core's settings of the parallel layers.
        recompute: activation checkpointing of decoder layers.
    """
    if ".layers." in name:
        is_local = name.startswith("token_decoder")
        if is_local and config.has_cross_attention:
            return CrossAttentionLayer(config, megatron, recompute)
        return DecoderLayer(config, megatron, is_local, recompute)
    pieces: dict[str, Callable[[ModelConfig, TransformerConfig], nn.Module]] = {
        "embedder": build_embedder,
        "vanilla.input": VanillaInput,
        "block_decoder.output": BlockOutput,
        "token_decoder.input": build_token_input,
        "token_decoder.output": OutputHead,
        "vanilla.output": OutputHead,
    }
    return pieces[name](config, megatron)
