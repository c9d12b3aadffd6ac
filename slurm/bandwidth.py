"""How fast the tasks of a job reach each other."""

import os
import time
from collections.abc import Sequence
from datetime import timedelta
from types import TracebackType

import torch
import torch.distributed as dist

CPU_BYTES, GPU_BYTES = 32 << 20, 512 << 20
REPEATS = 3


class Network:
    """A process group over all tasks: NCCL where there are GPUs, gloo elsewhere.

    Args:
        store: through which they meet.
        rank: of this task.
        world: number of tasks.
        seconds: after which a transfer has failed.
    """

    def __init__(self, store: dist.Store, rank: int, world: int, seconds: float) -> None:
        on_gpu = torch.cuda.is_available()
        self._rank, self._world = rank, world
        self._device = torch.device("cpu")
        if on_gpu:
            self._device = torch.device("cuda", int(os.environ.get("SLURM_LOCALID", "0")) % torch.cuda.device_count())
            torch.cuda.set_device(self._device)
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=dist.PrefixStore("network", store),
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=seconds),
        )
        self._data = torch.ones((GPU_BYTES if on_gpu else CPU_BYTES) // 4, device=self._device)

    def __enter__(self) -> "Network":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            dist.barrier()  # rank 0 holds the store, so it must not leave first
            dist.destroy_process_group()

    def all_reduce_gbps(self) -> float:
        """Bus bandwidth of an all-reduce in GB/s, 2 (n - 1) / n bytes / seconds, of the slowest task."""
        dist.all_reduce(self._data)
        start = self._now()
        for _ in range(REPEATS):
            dist.all_reduce(self._data)
        seconds = torch.tensor((self._now() - start) / REPEATS, dtype=torch.float64, device=self._device)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        return 2 * (self._world - 1) / self._world * self._data.nbytes / seconds.item() / 1e9

    def slowest_node(self, nodes: Sequence[str]) -> tuple[str, float]:
        """The node to which rank 0 sends slowest, with the speed in GB/s; meaningful on rank 0."""
        per_node = self._world // len(nodes)
        speeds = []
        for number in range(1, len(nodes)):
            start = self._now()
            if self._rank == 0:
                dist.send(self._data, number * per_node)
                dist.recv(self._data[:1], number * per_node)
            elif self._rank == number * per_node:
                dist.recv(self._data, 0)
                dist.send(self._data[:1], 0)
            speeds.append((self._data.nbytes / (self._now() - start) / 1e9, nodes[number]))
        speed, node = min(speeds, default=(0.0, nodes[0]))
        return node, speed

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
