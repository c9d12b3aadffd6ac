"""Speed against the hardware: tokens per second, TFLOP/s by our own per-module count, MFU on known devices."""

import re
import time
from dataclasses import dataclass

import torch

from parallel.config import ModelConfig
from parallel.costs import forward_flops_per_token

# Dense bf16 tensor-core peaks in TFLOP/s, from the vendor's data sheets; an unknown device gets no MFU.
PEAK_TFLOPS = {
    "A100": 312.0,
    "GH200": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H200": 989.0,
    "L40S": 362.0,
}
BACKWARD_FACTOR = 3.0  # forward + backward with respect to inputs and to weights


@dataclass(frozen=True)
class Speed:
    """Speed over an interval.

    Attributes:
        tokens_per_second: over all processes.
        tflops_per_process: model TFLOP/s; recomputation does not count.
        model_flops_utilization: fraction of the device's bf16 peak; None if that is unknown.
    """

    tokens_per_second: float
    tflops_per_process: float
    model_flops_utilization: float | None


def device_peak_tflops() -> float | None:
    """Dense bf16 peak of this process's GPU, if it is in the table."""
    if not torch.cuda.is_available():
        return None
    words = re.split(r"[\s-]", torch.cuda.get_device_name())
    matches = [key for key in PEAK_TFLOPS if all(part in words for part in key.split())]
    return PEAK_TFLOPS[max(matches, key=len)] if matches else None


class SpeedMeter:
    """Measures the time spent in training steps between log points; pauses leave out validation and checkpoints."""

    def __init__(self, model: ModelConfig, world_size: int) -> None:
        self._flops_per_token = BACKWARD_FACTOR * forward_flops_per_token(model)
        self._world_size = world_size
        self._peak = device_peak_tflops()
        self._tokens = 0
        self._seconds = 0.0
        self.data_wait = 0.0
        self._started = time.perf_counter()

    def start_step(self) -> None:
        """Marks the start of a step, before its data is read."""
        self._started = time.perf_counter()

    def data_ready(self) -> None:
        """Marks that the step's data has been read."""
        self.data_wait += time.perf_counter() - self._started

    def end_step(self, tokens: int) -> None:
        """Marks the end of a step over so many tokens."""
        self._seconds += time.perf_counter() - self._started
        self._tokens += tokens

    def read(self) -> Speed:
        """Speed since the last call."""
        per_second = self._tokens / self._seconds if self._seconds else 0.0
        tflops = per_second * self._flops_per_token / self._world_size / 1e12
        self._tokens, self._seconds, self.data_wait = 0, 0.0, 0.0
        return Speed(per_second, tflops, tflops / self._peak if self._peak else None)
