"""What the first layers of a vanilla model make of each token alone."""

import torch
from torch import Tensor

from checkpoints.weights.piecewise_forward import fill_piece
from checkpoints.weights.weight_source import WeightSource
from parallel.config import ParallelConfig
from parallel.cpu_adaptation import compute_device
from parallel.inputs import MicroBatch, prepare_inputs
from parallel.pieces import build_piece
from parallel.stage import megatron_config
from parallel.structure import piece_names

CHUNK = 8192


@torch.no_grad()
def token_states(vanilla: WeightSource, num_layers: int) -> Tensor:
    """Hidden state of every id of the vocabulary, each a sequence of one token, after the first layers.

    One layer is in memory at a time. The topology of one process must be initialized.

    Args:
        vanilla: the model.
        num_layers: layers to pass.

    Returns:
        fp32 [V, D], on the CPU.
    """
    model = vanilla.model
    megatron = megatron_config(model, ParallelConfig(), torch.float32)
    ids = torch.arange(model.vocab_size)[:, None]
    states: Tensor = vanilla.read("vanilla.input.embedding.weight")
    for name in piece_names(model)[1 : num_layers + 1]:
        piece = build_piece(name, model, megatron)
        fill_piece(piece, name, vanilla.read)
        piece.eval().to(compute_device())
        for chunk in torch.arange(model.vocab_size).split(CHUNK):
            batch = MicroBatch(ids[chunk], torch.ones_like(ids[chunk], dtype=torch.bool))
            hidden = states[chunk][None].to(compute_device())
            states[chunk] = piece(hidden, prepare_inputs(model, batch))[0].cpu()
    return states
