"""Activation checkpointing: what the forward pass of a layer keeps, and what its backward pass computes again."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# From the fastest, which holds most, to the slowest: everything is kept; products and attention are; only the input is.
Policy = Literal["none", "selective", "layer"]
POLICIES: tuple[Policy, ...] = ("none", "selective", "layer")

_aten = torch.ops.aten
KEPT_OPERATIONS = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}
if torch.backends.mkldnn.is_available():
    KEPT_OPERATIONS.add(torch.ops.mkldnn._linear_pointwise.default)  # parallel/products.py


def run_checkpointed(
    transform: Callable[[Tensor, Tensor | None], Tensor],
    hidden: Tensor,
    mask: Tensor | None,
    is_selective: bool,
    row_parallel: Sequence[Tensor],
) -> Tensor:
    """Runs a layer whose backward pass computes again what is not kept.

    Args:
        transform: the layer: hidden states and mask -> hidden states.
        hidden: its input, which is kept.
        mask: of its attention.
        is_selective: products and attention are kept too.
        row_parallel: weights whose products are not worth keeping: nothing but the residual stream reads them, and
            under tensor parallelism they are summed over the ranks in place.
    """
    options: dict[str, Any] = {}
    if is_selective:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, partial(_keeps, row_parallel))
    result: Tensor = checkpoint(transform, hidden, mask, use_reentrant=False, preserve_rng_state=False, **options)
    return result


def _keeps(
    row_parallel: Sequence[Tensor], _context: object, operation: object, *arguments: Any, **_options: Any
) -> CheckpointPolicy:
    if operation not in KEPT_OPERATIONS:
        return CheckpointPolicy.PREFER_RECOMPUTE
    # By address: what arrives is a transposed view, of a gathered copy under ZeRO 3.
    places = {weight.data_ptr() for weight in row_parallel}
    if any(isinstance(argument, Tensor) and argument.data_ptr() in places for argument in arguments):
        return CheckpointPolicy.PREFER_RECOMPUTE
    return CheckpointPolicy.MUST_SAVE
