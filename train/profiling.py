"""A trace of a few steps, for TensorBoard's profile tab and Perfetto, and a picture of memory (train.profile)."""

import socket
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule, tensorboard_trace_handler

from parallel.topology import Coordinates

# Steps that are left out while caches fill, that are rehearsed under the profiler, and that are recorded.
SETTLING, WARM_UP, RECORDED = 2, 1, 2
LONGEST_TABLE = 60


class StepProfiler:
    """Records the first steps of an attempt once it has settled; files of earlier attempts stay.

    One data-parallel replica records, each of its ranks for itself: what differs between replicas is data only.

    Args:
        folder: receives `<host>_rank<n>.<time>.pt.trace.json.gz` and `memory_rank<n>.<time>` (.txt on CPU: memory by
            operation; .pickle on GPU, for https://pytorch.org/memory_viz).
        place: of this process.
        enabled: nothing happens otherwise.
    """

    def __init__(self, folder: Path, place: Coordinates, enabled: bool) -> None:
        self._folder = folder
        self._place = place
        self._profile: profile | None = None
        if enabled and place.data_rank == 0:
            self._profile = self._start()

    def step(self) -> None:
        """Marks the end of a step."""
        if self._profile is None:
            return
        self._profile.step()
        if self._profile.step_num == SETTLING + WARM_UP + RECORDED:
            self._stop()

    def close(self) -> None:
        """Ends the recording, if steps are still to come; says so, because nothing is written then."""
        if self._profile is None:
            return
        wanted = SETTLING + WARM_UP + RECORDED
        if self._place.rank == 0:
            print(
                f"warning: train.profile=true needs {wanted} steps in a row, and there were {self._profile.step_num}: "
                "no trace was written",
                flush=True,
            )
        self._profile.on_trace_ready = None
        self._profile.stop()
        self._profile = None

    def _start(self) -> profile:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history()
        self._folder.mkdir(parents=True, exist_ok=True)
        recording = profile(
            activities=activities,
            schedule=schedule(wait=SETTLING, warmup=WARM_UP, active=RECORDED, repeat=1),
            on_trace_ready=self._write,
            profile_memory=True,
        )
        recording.start()
        return recording

    def _stop(self) -> None:
        assert self._profile is not None
        self._profile.stop()
        self._profile = None
        if torch.cuda.is_available():
            torch.cuda.memory._record_memory_history(enabled=None)
        if self._place.rank == 0:
            print(f"train.profile: a trace of {RECORDED} steps is in {self._folder}", flush=True)

    def _write(self, recording: profile) -> None:
        rank = self._place.rank
        tensorboard_trace_handler(str(self._folder), f"{socket.gethostname()}_rank{rank}", use_gzip=True)(recording)
        memory = self._folder / f"memory_rank{rank}.{time.time_ns()}"
        if torch.cuda.is_available():
            torch.cuda.memory._dump_snapshot(str(memory.with_suffix(f"{memory.suffix}.pickle")))
            return
        table = recording.key_averages().table(sort_by="self_cpu_memory_usage", row_limit=LONGEST_TABLE)
        memory.with_suffix(f"{memory.suffix}.txt").write_text(table)
