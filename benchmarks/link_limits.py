"""What collectives between the processes of a group take, as they do in a training step: each after a product.

A step waits in each for whoever ends its product last, and does so hundreds of times: means count, of all processes.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor

REPEATS = 30
SIZES = [2**exponent for exponent in range(12, 26)]  # bytes
PRODUCT = 512  # width of the product before each collective; it takes some milliseconds


@dataclass(frozen=True)
class Link:
    """Constants of parallel.planning.hardware.Device.

    Attributes:
        bytes_per_second: of rings of all-reduces.
        latency: seconds of one of their steps.
        gather_cost: an all-gather or a reduce-scatter, on average, over an all-reduce.
    """

    bytes_per_second: float
    latency: float
    gather_cost: float


def measure_link() -> Link:
    """Measures collectives of many sizes in the running group; takes some seconds."""
    members = torch.distributed.get_world_size()
    sums, halves = [], []
    for size in SIZES:
        whole = torch.zeros(size // 4)
        part = torch.zeros(size // 4 // members)
        sums.append(_mean_seconds(lambda whole=whole: torch.distributed.all_reduce(whole)))  # type: ignore[misc]
        halves.append(_gather_seconds(whole, part))
    latency, seconds_per_byte = _line(SIZES, sums)
    rings = 2.0 * (members - 1)
    ratios = [half / whole for half, whole in zip(halves, sums, strict=True)]
    return Link(rings / members / seconds_per_byte, latency / rings, statistics.geometric_mean(ratios))


def _gather_seconds(whole: Tensor, part: Tensor) -> float:
    """Of an all-gather and a reduce-scatter, on average."""
    gather = _mean_seconds(lambda: torch.distributed.all_gather_into_tensor(whole, part))
    return (gather + _mean_seconds(lambda: torch.distributed.reduce_scatter_tensor(part, whole))) / 2


def _mean_seconds(collective: Callable[[], object]) -> float:
    factor = torch.ones(PRODUCT, PRODUCT)
    collective()
    seconds = torch.zeros((), dtype=torch.float64)
    for _ in range(REPEATS):
        factor @ factor
        started = time.perf_counter()
        collective()
        seconds += time.perf_counter() - started
    torch.distributed.all_reduce(seconds)
    return seconds.item() / REPEATS / torch.distributed.get_world_size()


def _line(sizes: list[int], seconds: list[float]) -> tuple[float, float]:
    """Seconds at size 0 and per byte of the line that is nearest to all, in ratio."""
    times = torch.tensor(seconds, dtype=torch.float64)
    rows = torch.stack((1.0 / times, torch.tensor(sizes, dtype=torch.float64) / times), dim=1)
    at_zero, per_byte = torch.linalg.lstsq(rows, torch.ones(len(sizes), 1, dtype=torch.float64)).solution.flatten()
    least = seconds[-1] / sizes[-1] / 10  # what else the machine does can bend the line
    return max(0.0, float(at_zero)), max(least, float(per_byte))
