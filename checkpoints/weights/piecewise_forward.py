"""Logits of our model, one piece at a time: built, filled, run and freed, so that it fits where the whole does not."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from parallel.config import ModelConfig, ParallelConfig
from parallel.inputs import MicroBatch, prepare_inputs
from parallel.output_head import OutputHead
from parallel.pieces import build_piece
from parallel.stage import megatron_config
from parallel.structure import piece_names


@torch.no_grad()
def piecewise_logits(model: ModelConfig, read: Callable[[str], Tensor], token_ids: Tensor) -> Tensor:
    """Logits of the predicted tokens; the topology of one process must be initialized.

    Args:
        model: settings of the model.
        read: gives a parameter by its global name.
        token_ids: int64 [B, S] without padding, on the device to compute on; S a multiple of the block length.

    Returns:
        fp32, [B, N - 1, L, V] of blocks 1 .. N - 1 for a Block Transformer, [B, S, V] for vanilla.
    """
    inputs = prepare_inputs(model, MicroBatch(token_ids, torch.ones_like(token_ids, dtype=torch.bool)))
    megatron = megatron_config(model, ParallelConfig(), torch.float32)
    *names, last = piece_names(model)
    hidden: Tensor = token_ids  # the first piece does not read it
    for name in names:
        piece = build_piece(name, model, megatron)
        fill_piece(piece, name, read)
        hidden = piece.eval().to(token_ids.device)(hidden, inputs)
    output = build_piece(last, model, megatron)
    assert isinstance(output, OutputHead)
    fill_piece(output, last, read)
    if model.tied_pieces:
        output.head.weight = nn.Parameter(read(f"{model.tied_pieces[0]}.embedding.weight"))
    logits = output.eval().to(token_ids.device).logits(hidden)
    if not model.is_block:
        return logits.transpose(0, 1)
    # Row n * B + b decodes block n + 1 of sequence b; the last rows have no block to decode.
    return logits.view(-1, len(token_ids), *logits.shape[1:])[:-1].transpose(0, 1)


def fill_piece(piece: nn.Module, name: str, read: Callable[[str], Tensor]) -> None:
    """Fills a piece's parameters in place; `read` gives them by global name."""
    for inner, parameter in piece.named_parameters():
        parameter.copy_(read(f"{name}.{inner}"))
