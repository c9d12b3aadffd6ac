"""Sums that every rank agrees on."""

import torch
import torch.distributed
from megatron.core import parallel_state

from parallel.schedule import LossSums


def global_loss_sums(sums: LossSums) -> LossSums:
    """Adds the loss sums of all ranks; tensor-parallel ranks hold the same values, so only the first counts."""
    packed = torch.stack((sums.loss, sums.count))
    if parallel_state.get_tensor_model_parallel_rank() != 0:
        packed = torch.zeros_like(packed)
    torch.distributed.all_reduce(packed)
    return LossSums(packed[0], packed[1])
