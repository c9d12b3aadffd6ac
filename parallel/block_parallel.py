"""The token decoder with its blocks spread over the tensor-parallel group instead of its matrices.

Given their context embeddings, blocks are independent of each other. So every rank can hold the whole token decoder and
run it on its own blocks: nothing is sent in its forward pass, and in backward only the gradients of its parameters are
summed, once in a step (under ZeRO 2 and 3 for each micro-batch), instead of hidden states in every layer. The head
stays split over the vocabulary and gathers the blocks as sequence parallelism does.
"""

from dataclasses import replace

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from parallel.inputs import ModelInputs


def undivided(megatron: TransformerConfig) -> TransformerConfig:
    """Settings for pieces that every rank holds whole."""
    return replace(megatron, tensor_model_parallel_size=1, sequence_parallel=False)


def with_gathered_input(megatron: TransformerConfig) -> TransformerConfig:
    """Settings for the piece behind them: a rank's rows come in, as under sequence parallelism."""
    return replace(megatron, sequence_parallel=True)


def mark_replicated(piece: nn.Module) -> None:
    """Marks the parameters of a piece as alike on all ranks, with gradients that are each rank's part."""
    for parameter in piece.parameters():
        parameter.tensor_model_parallel = False  # type: ignore[attr-defined]
        parameter.sequence_parallel = True  # type: ignore[attr-defined]


def own_blocks(context: Tensor) -> Tensor:
    """Context embeddings [N, B, D], the same on all ranks -> this rank's [N / TP, B, D]; gradients are gathered."""
    rows: Tensor = scatter_to_sequence_parallel_region(context, group=parallel_state.get_tensor_model_parallel_group())
    return rows


def own_inputs(inputs: ModelInputs) -> ModelInputs:
    """What the token decoder reads, for this rank's blocks."""
    mask = inputs.local_mask
    return replace(inputs, targets=_own(inputs.targets), local_mask=None if mask is None else _own(mask))


def _own(rows: Tensor) -> Tensor:
    parts = torch.chunk(rows, parallel_state.get_tensor_model_parallel_world_size())
    return parts[parallel_state.get_tensor_model_parallel_rank()]
