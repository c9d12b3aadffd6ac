"""What every rank agrees on: sums and what they say per target, requests, shards that are left out."""

import math
from dataclasses import dataclass

import torch
import torch.distributed
from megatron.core import parallel_state

from data.streaming.source import BadShard
from parallel.cpu_adaptation import compute_device
from parallel.schedule import LossSums
from train.requests import Request


def global_loss_sums(sums: LossSums) -> LossSums:
    """Adds the loss sums of all ranks; see agree."""
    return agree(sums, Request.NONE).sums


@dataclass(frozen=True)
class Agreement:
    """What all ranks know after an all-reduce.

    Attributes:
        sums: of all ranks.
        request: the most urgent of any.
        empty_sequences: sequences of all ranks that bad shards would have held.
    """

    sums: LossSums
    request: Request
    empty_sequences: int


def agree(sums: LossSums, request: Request, empty_sequences: int = 0) -> Agreement:
    """Adds the loss sums of all ranks and tells all of them the most urgent request of any, in one all-reduce.

    Tensor-parallel ranks hold the same losses and read the same sequences, so only the first counts; pipeline stages
    but the last hold zeros, and read the same sequences as the first.
    """
    packed = torch.cat((sums.loss, sums.count, sums.loss.new_tensor([float(empty_sequences)])))
    if parallel_state.get_tensor_model_parallel_rank() != 0:
        packed = torch.zeros_like(packed)
    if not parallel_state.is_pipeline_first_stage():
        packed[-1] = 0
    asked = packed.new_tensor([float(request >= level) for level in Request])
    packed = torch.cat((packed, asked))
    torch.distributed.all_reduce(packed)
    summed, asked = packed.split((len(packed) - len(Request), len(Request)))
    loss, count = summed[:-1].chunk(2)
    return Agreement(LossSums(loss, count), Request(int((asked > 0).sum()) - 1), int(summed[-1]))


def gather_bad_shards(found: dict[BadShard, str]) -> dict[BadShard, str]:
    """Tells all ranks which shards any of them found bad, and why; in the same order everywhere."""
    anywhere = torch.tensor([float(bool(found))], device=compute_device())
    torch.distributed.all_reduce(anywhere)
    if not anywhere.item():
        return {}
    gathered: list[dict[BadShard, str]] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, found)
    union = {shard: reason for of_rank in reversed(gathered) for shard, reason in of_rank.items()}
    return dict(sorted(union.items()))


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
