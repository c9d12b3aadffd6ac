"""Loss of every token of whole sequences."""

import torch
from torch import Tensor

from parallel.inputs import MicroBatch, prepare_inputs
from parallel.stage import Stage


@torch.no_grad()
def token_losses(stage: Stage, token_ids: Tensor) -> Tensor:
    """Cross entropy of each token from all before it.

    Args:
        stage: the whole model.
        token_ids: int64 [B, S], all real; S holds whole blocks.

    Returns:
        fp32 [B, S - L], nats, of the tokens L to S - 1: nothing predicts the first block (L = 1 for vanilla models).
    """
    config = stage.model_config
    inputs = prepare_inputs(config, MicroBatch(token_ids, torch.ones_like(token_ids, dtype=torch.bool)))
    losses = stage.run(None, inputs)
    # The last block (token) of each sequence predicts nothing.
    last = len(token_ids) if config.is_block else 1
    units = losses[:-last].view(-1, len(token_ids), config.unit_length)
    return units.transpose(0, 1).reshape(len(token_ids), -1)
