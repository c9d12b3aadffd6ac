"""Sums that every rank agrees on, and what they say per target."""

import math
from dataclasses import dataclass

import torch
import torch.distributed
from megatron.core import parallel_state

from parallel.schedule import LossSums


def global_loss_sums(sums: LossSums) -> LossSums:
    """Adds the loss sums of all ranks; see agree."""
    return agree(sums, stop=False)[0]


def agree(sums: LossSums, stop: bool) -> tuple[LossSums, bool]:
    """Adds the loss sums of all ranks and tells all of them whether any wants to stop, in one all-reduce.

    Tensor-parallel ranks hold the same losses, so only the first counts; other pipeline stages hold zeros.
    """
    packed = torch.cat((sums.loss, sums.count))
    if parallel_state.get_tensor_model_parallel_rank() != 0:
        packed = torch.zeros_like(packed)
    packed = torch.cat((packed, packed.new_tensor([float(stop)])))
    torch.distributed.all_reduce(packed)
    loss, count = packed[:-1].chunk(2)
    return LossSums(loss, count), bool(packed[-1] > 0)


@dataclass(frozen=True)
class MeanLoss:
    """Cross entropy per valid target, in nats.

    Attributes:
        loss: over all targets; NaN without any.
        by_position: by position in the block.
        targets: number of valid targets.
    """

    loss: float
    by_position: tuple[float, ...]
    targets: int


def mean_loss(sums: LossSums) -> MeanLoss:
    """Divides sums by counts."""
    loss, count = sums.loss.tolist(), sums.count.tolist()
    positions = tuple(value / number if number else math.nan for value, number in zip(loss, count, strict=True))
    total = sum(count)
    return MeanLoss(sum(loss) / total if total else math.nan, positions, int(total))
