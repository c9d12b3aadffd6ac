"""Where DeepSpeed 0.19.8 keeps the gradients of a step until it reduces them over data-parallel ranks."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


def accumulated_gradients(engine: Any, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Sums over the micro-batches since the last update, with ZeRO 0, or 1 without overlap; of those that have any."""
    optimizer = engine.optimizer
    if not hasattr(optimizer, "fp32_groups_gradients"):
        return [parameter.grad for parameter in parameters if parameter.grad is not None]
    # ZeRO 1 with bf16 adds them up in fp32, beside the parameters.
    groups = zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True)
    kept = {id(one): gradient for group in groups for one, gradient in zip(*group, strict=True)}
    return [kept[id(parameter)] for parameter in parameters]
