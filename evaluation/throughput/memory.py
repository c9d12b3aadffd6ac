"""The most memory that work takes."""

import ctypes
from pathlib import Path

import psutil
import torch

from parallel.resident_memory import peak_resident_bytes

RESET_PEAK = Path("/proc/self/clear_refs")


class PeakMemory:
    """Measures the most memory above what was in use before: of the allocator on a GPU, of the process on CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        else:
            # What was freed and kept for later would hide what is taken.
            ctypes.CDLL(None).malloc_trim(0)
            RESET_PEAK.write_text("5")
            self._before = psutil.Process().memory_info().rss

    def bytes(self) -> int:
        """The peak so far, minus what was in use at the beginning."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device)) - self._before
        return max(0, peak_resident_bytes() - self._before)
