"""Where the time of a training step goes, by component of the model."""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
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
    """Gives all time to the innermost of the named things that are running, so that none counts twice."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._running: list[str] = []
        self._counted_until = 0.0
        self.seconds: dict[str, float] = defaultdict(float)

    def start(self, name: str) -> None:
        self._count()
        self._running.append(name)

    def stop(self, name: str) -> None:
        self._count()
        if name in self._running:
            self._running.remove(name)

    def _count(self) -> None:
        synchronize(self._device)
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._counted_until
        self._counted_until = now


def timed_components(engine: StepEngine, batches: Sequence[MicroBatch]) -> dict[str, float]:
    """Seconds of one step by component, forward and backward apart.

    What is computed again in the backward pass of a layer is "recomputation", and in no other component.

    Args:
        engine: takes the step.
        batches: this data-parallel rank's micro-batches.

    Returns:
        Seconds; what is in none of the components is "other".
    """
    clock = _Clock(batches[0].token_ids.device)
    with ExitStack() as watching:
        for name, module in components(engine.stage):
            for handle in _watch(module, name, clock):
                watching.callback(handle.remove)
        for layer in engine.stage.modules():
            if isinstance(layer, DecoderLayer):
                watching.callback(_watch_recomputation(layer, clock))
        clock.start("step")
        engine.accumulate(batches)
        clock.start("optimizer")
        engine.update(1e-4)
        clock.stop("optimizer")
        clock.stop("step")
    other = clock.seconds.pop("step")
    return {**clock.seconds, "other": other, "step": other + sum(clock.seconds.values())}


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
        return lambda *_: None if _is_in_backward() else action(forward)

    handles: list[Any] = [
        module.register_forward_pre_hook(on_forward(clock.start)),
        module.register_forward_hook(on_forward(clock.stop)),
    ]
    if name not in FIRST:  # whose inputs have no gradients, without which there is no end of backward
        handles.append(module.register_full_backward_pre_hook(on(clock.start, backward)))
        handles.append(module.register_full_backward_hook(on(clock.stop, backward)))
    return handles


def _watch_recomputation(layer: DecoderLayer, clock: _Clock) -> Callable[[], None]:
    """Times what the layer's backward pass computes again; returns what ends that."""
    name = "transform" if hasattr(layer, "transform") else "_transform"  # of older versions
    transform = getattr(layer, name)

    def timed(*arguments: Any) -> Any:
        if not _is_in_backward():
            return transform(*arguments)
        clock.start("recomputation")
        try:
            return transform(*arguments)
        finally:  # torch ends it by an exception, as soon as all is there that was not kept
            clock.stop("recomputation")

    setattr(layer, name, timed)
    return partial(delattr, layer, name)


def _is_in_backward() -> bool:
    """Whether autograd is running, as torch.utils.checkpoint asks it."""
    return torch._C._current_graph_task_id() != -1
