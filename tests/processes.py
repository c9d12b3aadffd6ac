"""Runs a function in a group of real processes over gloo.

The processes are forked from one server that has imported everything, because importing torch, Megatron-core and
DeepSpeed costs seconds of CPU time per process.
"""

import multiprocessing
import os
import random
import socket
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["train.selftest", "train.trainer"])


def run_processes(
    world_size: int, function: Callable[..., Any], *arguments: Any, may_die: bool = False, timeout: float = 600.0
) -> list[Any]:
    """Calls function(*arguments) in each of world_size processes joined in a gloo group.

    Args:
        world_size: number of processes.
        function: importable function.
        *arguments: its arguments.
        may_die: processes may be killed or fail; then nothing is returned.
        timeout: seconds to wait for all of them.

    Returns:
        The values returned, by rank.

    Raises:
        AssertionError: a process failed; holds its traceback.
    """
    port = _free_port()
    queue = _context.Queue()
    processes = [
        _context.Process(target=_run, args=(rank, world_size, port, queue, function, arguments))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        if may_die:
            for process in processes:
                process.join(timeout)
                assert process.exitcode is not None, f"a process still runs after {timeout} s"
            return []
        results: dict[int, Any] = {}
        for _ in processes:
            rank, succeeded, value = queue.get(timeout=timeout)
            assert succeeded, f"rank {rank} failed:\n{value}"
            results[rank] = value
        return [results[rank] for rank in range(world_size)]
    finally:
        for process in processes:
            process.join(timeout=20)
            if process.is_alive():
                process.kill()


def _free_port() -> int:
    """A port that is free now, below the range from which the system hands them out to anybody meanwhile."""
    while True:
        with socket.socket() as listener, suppress(OSError):
            port = random.randrange(10_000, 30_000)
            listener.bind(("127.0.0.1", port))
            return port


def _run(
    rank: int, world_size: int, port: int, queue: Any, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    import torch

    from parallel.topology import start_process_group

    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    try:
        start_process_group()
        queue.put((rank, True, function(*arguments)))
    except BaseException:
        queue.put((rank, False, traceback.format_exc()))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
