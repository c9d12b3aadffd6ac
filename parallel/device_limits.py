"""What this device can do at best: the yardsticks that measured speeds are held against."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

REPEATS = 5
SECONDS_OF_REPEATS = 4.0  # after so long no further one is begun
SECONDS_OF_PRODUCT = 4.0  # of the largest; on a CPU without instructions for bf16, 4,096 rows would take minutes


@dataclass(frozen=True)
class DeviceLimits:
    """Measured limits.

    Attributes:
        device: name of the device.
        dtype: type of the values.
        flops_per_second: of a large product of square matrices.
        bytes_per_second: read and written together by a large copy.
    """

    device: str
    dtype: str
    flops_per_second: float
    bytes_per_second: float

    def seconds(self, flops: float, moved_bytes: float) -> float:
        """The least time for so much work (the roofline model)."""
        return max(flops / self.flops_per_second, moved_bytes / self.bytes_per_second)

    def describe(self) -> str:
        """Sums them up in one line."""
        return (
            f"{self.device}, {self.dtype}: products {self.flops_per_second / 1e9:,.0f} GFLOP/s, "
            f"copies {self.bytes_per_second / 1e9:,.1f} GB/s"
        )


def measure_device_limits(device: torch.device, dtype: torch.dtype) -> DeviceLimits:
    """Measures both limits; takes a few seconds.

    Args:
        device: where.
        dtype: type of the values.
    """
    source = torch.zeros(2**28 if device.type == "cpu" else 2**31, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return DeviceLimits(
        device=device_name(device),
        dtype=str(dtype).removeprefix("torch."),
        flops_per_second=_product_flops_per_second(device, dtype),
        bytes_per_second=2.0 * source.nbytes / _best_seconds(lambda: target.copy_(source), device),
    )


def _product_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Of square matrices, each twice as large as the one before: the largest that do not take long."""
    size, largest = 512, 4096 if device.type == "cpu" else 8192
    while True:
        factor = torch.randn(size, size, device=device).to(dtype)
        product = torch.empty_like(factor)
        seconds = _best_seconds(functools.partial(torch.mm, factor, factor, out=product), device)
        if size == largest or 8 * seconds > SECONDS_OF_PRODUCT:
            return 2.0 * size**3 / seconds
        size *= 2


def device_name(device: torch.device) -> str:
    """The model of a GPU; of a CPU also how many threads are used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def synchronize(device: torch.device) -> None:
    """Waits for all work that the device was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _best_seconds(work: Callable[[], object], device: torch.device) -> float:
    work()
    best, spent = float("inf"), 0.0
    for _ in range(REPEATS):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        seconds = time.perf_counter() - started
        best = min(best, seconds)
        spent += seconds
        if spent > SECONDS_OF_REPEATS:
            break
    return best
