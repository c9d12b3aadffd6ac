"""Process groups one after another in the same processes, as the stages of an uptraining under torchrun start them."""

import os
from pathlib import Path

import torch.distributed

from parallel import topology
from parallel.config import ParallelConfig
from tests.processes import run_processes


def _sums_of_groups_in_turn() -> list[float]:
    """Starts groups that meet at a store which outlives them, like that of torchrun."""
    rank = torch.distributed.get_rank()
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if rank == 0 else None
    box = [server.port if server else None]
    torch.distributed.broadcast_object_list(box)
    torch.distributed.destroy_process_group()
    os.environ.update(MASTER_PORT=str(box[0]), TORCHELASTIC_USE_AGENT_STORE="True")
    topology._meeting_point.cache_clear()
    sums = []
    for value in (1.0, 2.0, 3.0):
        topology.start_process_group()
        topology.initialize_topology(ParallelConfig(data=2))
        tensor = torch.tensor(value)
        torch.distributed.all_reduce(tensor)
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        sums.append(float(tensor))
        if rank == 0:
            topology.start_single_process()
            torch.distributed.destroy_process_group()
    return sums


def test_groups_follow_each_other_at_one_store() -> None:
    assert run_processes(2, _sums_of_groups_in_turn) == [[2.0, 4.0, 6.0]] * 2


def _data_ranks(layouts: list[ParallelConfig]) -> list[tuple[int, int]]:
    rank = torch.distributed.get_rank()
    return [(topology.initialize_topology(layout).data_rank, layout.data_rank(rank)) for layout in layouts]


def test_the_data_parallel_rank_is_known_without_a_process_group() -> None:
    layouts = [ParallelConfig(tensor=2, data=2), ParallelConfig(pipeline=2, data=2), ParallelConfig(data=4)]
    for ranks in run_processes(4, _data_ranks, layouts):
        assert all(actual == computed for actual, computed in ranks)


def _threads_after_each(layouts: list[ParallelConfig]) -> list[int]:
    threads = []
    for layout in layouts:
        topology.initialize_topology(layout)
        torch.distributed.barrier()
        threads.append(len(list(Path("/proc/self/task").iterdir())))
    return threads


def test_a_new_topology_ends_the_groups_of_the_one_before() -> None:
    layouts = [ParallelConfig(tensor=2), ParallelConfig(pipeline=2)] * 3
    for threads in run_processes(2, _threads_after_each, layouts):
        assert threads[-2:] == threads[:2]
