"""The one topology: tensor x pipeline x data on `megatron.core.parallel_state`, and DeepSpeed's view of it."""

import itertools
import os
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed
from megatron.core import parallel_state

from parallel.config import ParallelConfig
from parallel.cpu_adaptation import adapt_megatron_to_cpu
from parallel.errors import ConfigurationError

_started_groups = itertools.count()


@dataclass(frozen=True)
class Coordinates:
    """Where this process stands in the layout."""

    rank: int
    tensor_rank: int
    pipeline_rank: int
    data_rank: int
    is_first_stage: bool
    is_last_stage: bool


class DeepSpeedTopology:
    """`megatron.core.parallel_state` as DeepSpeed asks for it (its `mpu` argument).

    DeepSpeed 0.19.8 asks for `get_model_parallel_*`, which Megatron-core no longer has. The rank must be the
    tensor-parallel one: DeepSpeed counts replicated parameters in the gradient norm only where it is 0, and with a
    rank over tensor x pipeline those of later stages would be left out.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(parallel_state, name)

    def get_model_parallel_world_size(self) -> int:
        """Processes that together hold one model replica."""
        return torch.distributed.get_world_size(group=parallel_state.get_model_parallel_group())

    def get_model_parallel_rank(self) -> int:
        """Tensor-parallel rank; see the class."""
        return int(parallel_state.get_tensor_model_parallel_rank())


def start_process_group(timeout: timedelta = timedelta(minutes=30)) -> None:
    """Joins the process group described by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # orders communication before computation under TP
    backend = "gloo"
    if torch.cuda.is_available():
        device = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
        torch.cuda.set_device(device)
        # DeepSpeed takes it for the index of a GPU, which it is not where each process sees only its own.
        os.environ["LOCAL_RANK"] = str(device)
        backend = "nccl"
    store, rank, world_size = _meeting_point(timeout)
    # Torchrun's store outlives a group; the addresses that one has left there must not be read by the next.
    own_keys = torch.distributed.PrefixStore(f"group_{next(_started_groups)}", store)
    torch.distributed.init_process_group(backend, store=own_keys, rank=rank, world_size=world_size, timeout=timeout)


@cache
def _meeting_point(timeout: timedelta) -> tuple[torch.distributed.Store, int, int]:
    """The job's store, the same for all groups that a process starts; its rank and the number of processes."""
    meeting: tuple[torch.distributed.Store, int, int] = next(torch.distributed.rendezvous("env://", timeout=timeout))
    return meeting


def start_single_process() -> Coordinates:
    """Makes this process a group of its own with the topology of one process laid over it; uses no network."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    return initialize_topology(ParallelConfig())


def initialize_topology(parallel: ParallelConfig) -> Coordinates:
    """Lays tensor x pipeline x data groups over the running process group.

    Raises:
        ConfigurationError: the number of processes is not the layout's.
    """
    world_size = torch.distributed.get_world_size()
    if world_size != parallel.world_size:
        raise ConfigurationError(
            f"the layout parallel.tensor={parallel.tensor} x parallel.pipeline={parallel.pipeline} x "
            f"parallel.data={parallel.data} needs {parallel.world_size} processes, but {world_size} were started; "
            f"set parallel.data={max(1, world_size // (parallel.tensor * parallel.pipeline))} or start "
            f"{parallel.world_size}"
        )
    adapt_megatron_to_cpu()
    _release_topology()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        create_gloo_process_groups=False,
    )
    return coordinates()


def _release_topology() -> None:
    """Ends the groups of the topology before, which Megatron-core 0.16.1 forgets with all their threads running."""
    for group in (parallel_state._global_process_group_list or [])[1:]:
        with suppress(ValueError):  # it ended with the world's group
            torch.distributed.destroy_process_group(group)
    parallel_state.destroy_model_parallel()


def coordinates() -> Coordinates:
    """This process's place in the initialized topology."""
    return Coordinates(
        rank=torch.distributed.get_rank(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        data_rank=parallel_state.get_data_parallel_rank(),
        is_first_stage=parallel_state.is_pipeline_first_stage(),
        is_last_stage=parallel_state.is_pipeline_last_stage(),
    )


def sum_over_tensor_parallel(value: torch.Tensor) -> torch.Tensor:
    """Sums a tensor over the tensor-parallel group, in place."""
    torch.distributed.all_reduce(value, group=parallel_state.get_tensor_model_parallel_group())
    return value


def sum_over_data_parallel(value: torch.Tensor) -> torch.Tensor:
    """Sums a tensor over the data-parallel group, in place."""
    torch.distributed.all_reduce(value, group=parallel_state.get_data_parallel_group())
    return value
