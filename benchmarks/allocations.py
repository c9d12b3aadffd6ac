"""Bytes that torch really takes on CPU, from its profiler, and what the system counts for the process."""

import ctypes
import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

# Parameters of mallopt, from malloc.h of the GNU C library.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8


@dataclass
class Allocations:
    """What was taken between two moments, and not given back by the second; memory from before does not count.

    Attributes:
        peak: most bytes at a time.
        left: bytes at the end.
    """

    peak: int = 0
    left: int = 0


@contextmanager
def traced_allocations() -> Iterator[Allocations]:
    """Traces torch's CPU allocator; the numbers are there when the block has ended."""
    result = Allocations()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield result
    live: dict[int, int] = {}
    overtaken: Counter[int] = Counter()
    current = 0
    for event in _events(profiler):
        details = event.extra_fields
        if details.alloc_size > 0:
            # Events of the same moment come in any order: what was at this address has been released, and will say so.
            overtaken[details.ptr] += details.ptr in live
            current += details.alloc_size - live.get(details.ptr, 0)
            live[details.ptr] = details.alloc_size
        elif overtaken[details.ptr]:
            overtaken[details.ptr] -= 1
        else:
            current -= live.pop(details.ptr, 0)
        result.peak = max(result.peak, current)
    result.left = current


def _events(profiler: Any) -> list[Any]:
    """Allocations and releases in the order of time."""
    found = []
    pending = list(profiler.profiler.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        if event.tag == _EventType.Allocation:
            found.append(event)
    return sorted(found, key=lambda event: event.start_time_ns)


def return_freed_memory() -> None:
    """Has the C library give all freed memory back to the system, that of large tensors as soon as they are freed."""
    library = ctypes.CDLL("libc.so.6")
    settings = ((_MMAP_THRESHOLD, 2**16), (_MMAP_MAX, 2**16), (_TRIM_THRESHOLD, 2**16), (_ARENA_MAX, 1))
    assert all(library.mallopt(parameter, value) == 1 for parameter, value in settings)
    gc.collect()
    library.malloc_trim(0)


def resident_bytes() -> int:
    """Resident memory of this process."""
    return _status("VmRSS")


def restart_peak() -> int:
    """Forgets the process's peak of resident memory so far (Linux); returns what is resident now."""
    with suppress(OSError):  # where the kernel cannot, the peak is at least not too small
        Path("/proc/self/clear_refs").write_text("5")
    return resident_bytes()


def peak_resident_bytes() -> int:
    """Most resident memory of this process since then, or since it was started."""
    return _status("VmHWM")


@contextmanager
def traced_residence() -> Iterator[Allocations]:
    """Traces the process's resident memory above what it is at the start (Linux)."""
    result = Allocations()
    before = restart_peak()
    yield result
    result.peak, result.left = peak_resident_bytes() - before, resident_bytes() - before


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {name}")
