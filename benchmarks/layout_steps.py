"""Step times of layouts in turn: processes stay, and train one layout after the other as they are told to."""

import gc
import multiprocessing
import os
import signal
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, Self

import torch
import torch.distributed
import torch.nn.functional as F

from benchmarks.link_limits import Link, measure_link
from parallel.errors import ConfigurationError
from parallel.host_memory import keep_freed_memory
from parallel.inputs import MicroBatch
from parallel.planning.policies import stage_policies
from parallel.planning.workload import Workload
from parallel.stage import build_stage
from parallel.topology import initialize_topology, start_process_group
from slurm.identity import free_port
from train.config import OptimizerConfig
from train.step import StepEngine

SECONDS_TO_END = 20


def train_steps(work: Workload, steps: int) -> list[float]:
    """Trains in this process of a running group; the seconds of each step."""
    plain_linear = F.linear  # ZeRO 3 puts its own in the place of it, for all models of a process
    place = initialize_topology(work.parallel)
    dtype = torch.bfloat16 if work.precision == "bf16" else torch.float32
    stage = build_stage(work.model, work.parallel, dtype, policies=stage_policies(work, place.pipeline_rank))
    engine = StepEngine(
        stage, work.parallel, OptimizerConfig(learning_rate=1e-4), work.precision, work.micro_batch_size
    )
    ids = torch.randint(work.model.vocab_size, (work.micro_batch_size, work.model.sequence_length))
    batches = [MicroBatch(ids, torch.ones_like(ids, dtype=torch.bool))] * work.num_micro_batches
    seconds = []
    for _ in range(steps):
        gc.collect()  # what a step leaves in cycles would otherwise be there or not in the next one
        started = time.perf_counter()
        engine.accumulate(batches)
        engine.update(1e-4)
        seconds.append(time.perf_counter() - started)
    engine.engine.destroy()
    F.linear = plain_linear
    return seconds


def join_group(rank: int, world_size: int, port: int) -> None:
    """Makes this process a rank of a new group on this machine, with one thread."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    start_process_group()


class LayoutProcesses:
    """Processes for all layouts of one world size; use it in a with statement."""

    def __init__(self, world_size: int) -> None:
        context = multiprocessing.get_context("spawn")
        port = free_port()
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, port, theirs), daemon=True)
            process.start()
            theirs.close()  # so that the end of the process is the end of the connection
            self._connections.append(ours)
            self._processes.append(process)

    def steps(self, work: Workload, count: int) -> list[float]:
        """Builds a layout and trains it; the seconds of each step, of its slowest process."""
        return [max(ranks) for ranks in zip(*self._ask((work, count)), strict=True)]

    def link(self) -> Link:
        """Measures what connects the processes; of rank 0."""
        answer: Link = self._ask("link")[0]
        return answer

    def _ask(self, command: Any) -> list[Any]:
        try:
            for connection in self._connections:
                connection.send(command)
            return [connection.recv() for connection in self._connections]
        except (EOFError, OSError):
            raise ConfigurationError(
                "a process has ended, see its message above; without one it was out of memory"
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._connections:
            with suppress(OSError):  # it has ended
                connection.send(None)
        deadline = time.monotonic() + SECONDS_TO_END
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()


def _serve(rank: int, world_size: int, port: int, connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asks is interrupted too, and ends this process
    join_group(rank, world_size, port)
    keep_freed_memory()
    with suppress(EOFError):  # whoever asked has ended
        while (command := connection.recv()) is not None:
            connection.send(measure_link() if command == "link" else train_steps(*command))
    torch.distributed.destroy_process_group()
