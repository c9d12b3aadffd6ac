"""Where the time of a training step goes, by component of the model."""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from parallel.decoder_layer import DecoderLayer
from parallel.device_limits import synchronize
from parallel.inputs import MicroBatch
from parallel.stage import Stage
from train.step import StepEngine

# The head computes its gradients with its loss, in forward.
HEAD = "head + loss"
FIRST = ("embedder", "vanilla.input")


class _Clock:
    """Adds up the time between the beginnings and ends of named things."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._started: dict[str, float] = {}
        self.seconds: dict[str, float] = defaultdict(float)

    def start(self, name: str) -> None:
        synchronize(self._device)
        self._started[name] = time.perf_counter()

    def stop(self, name: str) -> None:
        synchronize(self._device)
        if name in self._started:
            self.seconds[name] += time.perf_counter() - self._started.pop(name)


def timed_components(engine: StepEngine, batches: Sequence[MicroBatch]) -> dict[str, float]:
    """Seconds of one step by component, forward and backward apart.

    Args:
        engine: takes the step.
        batches: this data-parallel rank's micro-batches.

    Returns:
        Seconds; what is in none of the components is "other".
    """
    clock = _Clock(batches[0].token_ids.device)
    handles = [handle for name, module in components(engine.stage) for handle in _watch(module, name, clock)]
    clock.start("step")
    engine.accumulate(batches)
    clock.start("optimizer")
    engine.update(1e-4)
    clock.stop("optimizer")
    clock.stop("step")
    for handle in handles:
        handle.remove()
    whole = clock.seconds.pop("step")
    return {**clock.seconds, "other": whole - sum(clock.seconds.values()), "step": whole}


def components(stage: Stage) -> list[tuple[str, nn.Module]]:
    """The modules that are timed, and by what name; compiled layers as a whole."""
    found: list[tuple[str, nn.Module]] = []
    for name in stage.names:
        piece = stage.piece(name)
        if isinstance(piece, DecoderLayer):
            decoder = name.split(".")[0].replace("_", " ")
            if getattr(piece, "compiled", None):  # hooks inside would be compiled too; older versions have none
                found.append((f"{decoder}, layers", piece))
                continue
            found += [(f"{decoder}, attention", piece.attention), (f"{decoder}, feed-forward", piece.feed_forward)]
        else:
            found.append((HEAD if name.endswith(".output") and "block" not in name else name, piece))
    return found


def _watch(module: nn.Module, name: str, clock: _Clock) -> list[Any]:
    forward, backward = f"{name}: forward", f"{name}: backward"

    def on(action: Callable[[str], None], what: str) -> Callable[..., None]:
        return lambda *_: action(what)

    def on_forward(action: Callable[[str], None]) -> Callable[..., None]:
        return lambda *_: action("recomputation" if _is_in_backward() else forward)

    handles: list[Any] = [
        module.register_forward_pre_hook(on_forward(clock.start)),
        module.register_forward_hook(on_forward(clock.stop)),
    ]
    if name not in FIRST:  # whose inputs have no gradients, without which there is no end of backward
        handles.append(module.register_full_backward_pre_hook(on(clock.start, backward)))
        handles.append(module.register_full_backward_hook(on(clock.stop, backward)))
    return handles


def _is_in_backward() -> bool:
    """Whether autograd is running, as torch.utils.checkpoint asks it."""
    return torch._C._current_graph_task_id() != -1
