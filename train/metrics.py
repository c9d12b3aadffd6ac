"""Sums that every rank agrees on, and what they say per target."""

import math
from dataclasses import dataclass

import torch
import torch.distributed
from megatron.core import parallel_state

from parallel.schedule import LossSums
from train.requests import Request


def global_loss_sums(sums: LossSums) -> LossSums:
    """Adds the loss sums of all ranks; see agree."""
    return agree(sums, Request.NONE)[0]


def agree(sums: LossSums, request: Request) -> tuple[LossSums, Request]:
    """Adds the loss sums of all ranks and tells all of them the most urgent request of any, in one all-reduce.

    Tensor-parallel ranks hold the same losses, so only the first counts; other pipeline stages hold zeros.
    """
    packed = torch.cat((sums.loss, sums.count))
    if parallel_state.get_tensor_model_parallel_rank() != 0:
        packed = torch.zeros_like(packed)
    asked = packed.new_tensor([float(request >= level) for level in Request])
    packed = torch.cat((packed, asked))
    torch.distributed.all_reduce(packed)
    loss, count = packed[: -len(Request)].chunk(2)
    most_urgent = int((packed[-len(Request) :] > 0).sum()) - 1
    return LossSums(loss, count), Request(most_urgent)


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
