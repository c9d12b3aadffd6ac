"""Throws accumulated gradients away instead of applying them: DeepSpeed 0.19.8 has no call for it.

It does so itself when the gradient norm is not finite, so ZeRO is shown an infinite norm for one step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def discard_gradients(engine: Any) -> None:
    """Drops the gradients of a DeepSpeed engine; weights, moments and step counts of the optimizer stay as they are."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        optimizer.zero_grad()
    elif hasattr(optimizer, "clear_hp_grads"):  # ZeRO 1 with bf16
        optimizer.clear_hp_grads()
        optimizer.clear_lp_grads()
    elif stage == 3:
        with _replaced(optimizer, "_get_norm_groups", lambda: [torch.tensor(torch.inf)]):
            engine.step()
    else:
        with _replaced(optimizer, "scaled_global_norm", lambda: torch.tensor(torch.inf)):
            engine.step()


@contextmanager
def _replaced(instance: Any, name: str, function: Any) -> Iterator[None]:
    setattr(instance, name, function)
    try:
        yield
    finally:
        delattr(instance, name)
