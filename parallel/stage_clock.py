"""How long pipeline stages compute and wait, measured through Megatron-core's hook for timers."""

import time
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from torch import Tensor

# What Megatron-core 0.16 calls a stage's own work on a micro-batch, and all of its schedule.
COMPUTE = ("forward-compute", "backward-compute")
SCHEDULE = "forward-backward"


@dataclass(frozen=True)
class PipelineUse:
    """What the stages of a pipeline did in a step.

    Attributes:
        bubble: part of the forward and backward passes in which the average stage waits.
        stage_balance: computing time of the average stage over that of the slowest.
    """

    bubble: float
    stage_balance: float


class StageClock:
    """Adds up this stage's time; is what `TransformerConfig.timers` wants: called with a name, it gives that timer.

    On a GPU, events in the stream are recorded, and nothing waits before `use`.

    Args:
        device: where the stage computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._timers: dict[str, _Timer] = {}

    def __call__(self, name: str, log_level: int = 0) -> "_Timer":
        """The timer of that name; there is one level only."""
        if name not in self._timers:
            self._timers[name] = _Timer(self._device.type == "cuda")
        return self._timers[name]

    def reset(self) -> None:
        """Forgets all that was measured."""
        self._timers.clear()

    def use(self) -> PipelineUse | None:
        """What all stages measured since the last reset; None: nothing. A collective of the pipeline's group."""
        computing = sum(self(name).seconds() for name in COMPUTE)
        mine = torch.tensor([computing, self(SCHEDULE).seconds()], dtype=torch.float64, device=self._device)
        busy, spans = _of_all_stages(mine).unbind(dim=1)
        if not spans.max():
            return None
        mean = float(busy.mean())
        return PipelineUse(1.0 - mean / float(spans.max()), mean / float(busy.max()))


class _Timer:
    """Time between starts and stops."""

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._seconds = 0.0
        self._started = 0.0
        self._events: list[torch.cuda.Event] = []  # starts and stops in turn

    def start(self, barrier: bool = False) -> None:
        """Nobody is waited for."""
        if self._on_gpu:
            self._record()
        else:
            self._started = time.perf_counter()

    def stop(self, barrier: bool = False) -> None:
        """Ends what was started last."""
        if self._on_gpu:
            self._record()
        else:
            self._seconds += time.perf_counter() - self._started

    def _record(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)

    def seconds(self) -> float:
        """All of them together; waits for the GPU."""
        if self._events:
            self._events[-1].synchronize()
        pairs = zip(self._events[::2], self._events[1::2], strict=True)
        return self._seconds + sum(start.elapsed_time(stop) for start, stop in pairs) / 1000


def _of_all_stages(mine: Tensor) -> Tensor:
    """[n] of each stage -> [stages, n]."""
    group = parallel_state.get_pipeline_model_parallel_group()
    found = mine.new_empty(group.size(), len(mine))
    torch.distributed.all_gather_into_tensor(found.flatten(), mine, group=group)
    return found
