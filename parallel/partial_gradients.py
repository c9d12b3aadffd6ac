"""Sums of gradients of which each tensor-parallel rank has only a part (parallel.linear.mark_partial_gradient)."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from parallel.topology import sum_over_tensor_parallel

# Gradients up to so many values are sent together: their number costs more than their bytes.
BUCKET_VALUES = 4 * 2**20


def partial_parameters(stage: nn.Module) -> list[nn.Parameter]:
    """Parameters that all tensor-parallel ranks hold alike, with gradients that are each rank's part."""
    return [parameter for parameter in stage.parameters() if getattr(parameter, "sequence_parallel", False)]


def sum_as_they_arise(stage: nn.Module) -> None:
    """Has the gradients of each backward pass summed at once, for optimizers that reduce them away during it."""
    for parameter in partial_parameters(stage):
        parameter.register_hook(_summed)


def sum_accumulated(gradients: Iterable[Tensor]) -> None:
    """Sums accumulated gradients over the tensor-parallel group, in place: once for a step, small ones together."""
    for bucket in _buckets(sorted(gradients, key=Tensor.numel)):
        if len(bucket) == 1 and bucket[0].is_contiguous():
            sum_over_tensor_parallel(bucket[0])
            continue
        flat = sum_over_tensor_parallel(torch.cat([gradient.reshape(-1) for gradient in bucket]))
        for gradient, part in zip(bucket, flat.split([one.numel() for one in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive gradients that together do not exceed the size of a bucket, unless one alone does."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and sum(one.numel() for one in bucket) + gradient.numel() > BUCKET_VALUES:
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


def _summed(gradient: Tensor) -> Tensor:
    return sum_over_tensor_parallel(gradient.contiguous().clone())
