"""Cross entropy of a linear layer's outputs, computed in chunks of rows: the logits of all targets are never held.

The head is the largest part of a small model (77 % of the FLOPs of the paper's 5M one). Its logits would take V values
per target, three times over with their softmax and gradient. Here each chunk's logits become its gradient in place, and
that already in the forward pass; backward only multiplies by what arrives. Nothing is computed twice, and nothing at
all for padded targets.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from parallel.products import product

# Of a chunk's logits in fp32. Smaller chunks cost speed: each packs the whole matrix anew for its product
# (50,304 x 256 on two cores: 131 GFLOP/s with 128 rows, 163 with 512, 180 with 1,024).
CHUNK_BYTES = 2**28


@dataclass
class _Targets:
    """The valid ones of T targets; n of them.

    Attributes:
        rows: [n, D], the linear layer's inputs.
        ids: int64 [n], what they should predict.
        index: int64 [n], where they stood among all; None: they are all.
    """

    rows: Tensor
    ids: Tensor
    index: Tensor | None

    @classmethod
    def valid(cls, hidden: Tensor, ids: Tensor, valid: Tensor) -> "_Targets":
        """Those of [..., D] that are valid."""
        rows, ids = hidden.reshape(-1, hidden.shape[-1]), ids.flatten()
        index = valid.flatten().nonzero().squeeze(1)
        if len(index) == len(ids):
            return cls(rows, ids, None)
        return cls(rows.index_select(0, index), ids.index_select(0, index), index)

    def chunks(self, weight: Tensor, chunk_bytes: int) -> Iterator[slice]:
        """Slices of the rows, as few as have room for their logits, of equal size."""
        rows, most = len(self.ids), max(1, chunk_bytes // (4 * len(weight)))
        size = math.ceil(rows / math.ceil(rows / most)) if rows else 1
        return (slice(start, min(start + size, rows)) for start in range(0, rows, size))

    def among_all(self, values: Tensor, count: int) -> Tensor:
        """Values of the valid targets [n, ...] at their places among all `count`; 0 elsewhere."""
        if self.index is None:
            return values
        return values.new_zeros(count, *values.shape[1:]).index_copy_(0, self.index, values)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, valid: Tensor, chunk_bytes: int = CHUNK_BYTES
) -> Tensor:
    """Cross entropy of softmax(hidden W^T) with a vocabulary that may be split over the tensor-parallel group.

    Args:
        hidden: [..., D], the same on all ranks of the group; its gradient is this rank's part of the sum over them.
        weight: W [V / TP, D].
        targets: int64 [...].
        valid: bool [...], targets that count.
        chunk_bytes: room for logits.

    Returns:
        fp32 [...], nats; 0 where not valid. Backward is free if its gradient is the same number for all valid targets,
        as it is of their sum or mean; if not, all is computed again.
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, valid, chunk_bytes)
        return loss
    with torch.no_grad():
        chosen = _Targets.valid(hidden, targets, valid)
        loss = chosen.rows.new_empty(len(chosen.ids), dtype=torch.float32)
        for part in chosen.chunks(weight, chunk_bytes):
            loss[part], _ = _losses(product(chosen.rows[part], weight), chosen.ids[part])
        return chosen.among_all(loss, targets.numel()).view(targets.shape)


@torch.no_grad()
def score_targets(
    hidden: Tensor, weight: Tensor, targets: Tensor, valid: Tensor, chunk_bytes: int = CHUNK_BYTES
) -> Tensor:
    """Cross entropy, and whether the target is the most likely token; arguments as those of linear_cross_entropy.

    Returns:
        fp32 [2, ...]; 0 where not valid.
    """
    chosen = _Targets.valid(hidden, targets, valid)
    scores = chosen.rows.new_empty(len(chosen.ids), 2, dtype=torch.float32)
    for part in chosen.chunks(weight, chunk_bytes):
        logits, ids = product(chosen.rows[part], weight), chosen.ids[part]
        # First, because the losses overwrite the logits.
        scores[part, 1] = (most_likely(logits) == ids).float()
        scores[part, 0], _ = _losses(logits, ids)
    return chosen.among_all(scores, targets.numel()).t().reshape(2, *targets.shape)


class _LinearCrossEntropy(torch.autograd.Function):
    """Losses, and beside them the gradients of their sum."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, valid: Tensor, chunk_bytes: int) -> Tensor:
        chosen = _Targets.valid(hidden, targets, valid)
        loss, *ctx.gradients = _with_gradients(chosen, weight, chunk_bytes, None)
        ctx.save_for_backward(weight)
        ctx.targets, ctx.chunk_bytes = chosen, chunk_bytes
        return chosen.among_all(loss, targets.numel()).view(targets.shape)

    @staticmethod
    def backward(ctx: Any, *arrived: Tensor) -> tuple[Tensor | None, ...]:
        (weight,), chosen = ctx.saved_tensors, ctx.targets
        # They become the gradients of the parameters, and are not copied if nobody else holds them.
        ready, ctx.gradients = ctx.gradients, None
        factors = arrived[0].flatten()
        factors = factors if chosen.index is None else factors.index_select(0, chosen.index)
        if ready is not None and bool((factors == factors[:1]).all()):
            row_gradient, weight_gradient = (gradient.mul_(factors[:1].sum()) for gradient in ready)
            del ready
        else:
            _, row_gradient, weight_gradient = _with_gradients(chosen, weight, ctx.chunk_bytes, factors)
        shape = (*arrived[0].shape, weight.shape[1])
        row_gradient = chosen.among_all(row_gradient, arrived[0].numel()).view(shape)
        return row_gradient, weight_gradient.to(weight.dtype), None, None, None


def _with_gradients(
    chosen: _Targets, weight: Tensor, chunk_bytes: int, factors: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, and the gradients of their sum, each loss times its factor; None: times 1.

    Returns:
        fp32 [n], gradients [n, D] and fp32 [V / TP, D].
    """
    rows, ids = chosen.rows, chosen.ids
    loss = rows.new_empty(len(ids), dtype=torch.float32)
    row_gradient = torch.empty_like(rows)
    weight_gradient = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
    for part in chosen.chunks(weight, chunk_bytes):
        loss[part], probabilities = _losses(product(rows[part], weight), ids[part])
        gradient = _subtract_targets_(probabilities, ids[part])
        if factors is not None:
            gradient.mul_(factors[part, None])
        gradient = gradient.to(weight.dtype)
        row_gradient[part] = product(gradient, weight.t())
        _add_product_(weight_gradient, gradient.t(), rows[part])
        del probabilities, gradient  # their memory is the next chunk's
    return loss, row_gradient, weight_gradient


def _losses(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of each row and this rank's probabilities.

    Args:
        logits: [rows, V / TP]; overwritten if they are fp32.
        ids: int64 [rows], of the whole vocabulary.

    Returns:
        fp32 [rows], fp32 [rows, V / TP].
    """
    largest = logits.amax(dim=1).float()
    place, is_here = _local(ids, logits.shape[1])
    target = logits.gather(1, place[:, None]).squeeze(1).float() * is_here
    if logits.dtype is torch.float32:
        probabilities = torch.softmax(logits, dim=1, out=logits)
    else:
        probabilities = torch.softmax(logits, dim=1, dtype=torch.float32)
    # The largest probability is exp(0) over the sum of exponentials.
    normalizer = largest - probabilities.amax(dim=1).log()
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return normalizer - target, probabilities
    mine = torch.stack((normalizer, target))
    parts = mine.new_empty(parallel_state.get_tensor_model_parallel_world_size(), *mine.shape)
    group = parallel_state.get_tensor_model_parallel_group()
    torch.distributed.all_gather_into_tensor(parts.flatten(0, 1), mine, group=group)
    overall = parts[:, 0].logsumexp(dim=0)
    return overall - parts[:, 1].sum(dim=0), probabilities.mul_((normalizer - overall).exp_()[:, None])


def _subtract_targets_(probabilities: Tensor, ids: Tensor) -> Tensor:
    """Probabilities minus 1 at the target: the gradient of the cross entropy with respect to the logits."""
    place, is_here = _local(ids, probabilities.shape[1])
    return probabilities.scatter_add_(1, place[:, None], -is_here[:, None].to(probabilities.dtype))


def _local(ids: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Where ids stand in this rank's part of the vocabulary, and whether they do (otherwise the place is 0)."""
    place = ids - parallel_state.get_tensor_model_parallel_rank() * size
    is_here = (place >= 0) & (place < size)
    return place * is_here, is_here


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds a product to an fp32 sum."""
    if left.dtype is total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


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
