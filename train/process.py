"""One process of a job: who it is, how it is set up and how it can end. Imports nothing heavy."""

import logging
import os
import sys
import warnings
from dataclasses import dataclass, field

from parallel.host_memory import keep_freed_memory
from train.startup import JobTimes

INTERACTIVE = "BLOCK_TRANSFORMER_INTERACTIVE"  # set to 1 by the launcher when a person watches the terminal
STOPPED_STATUS = 143
USER_ERROR_STATUS = 2


@dataclass(frozen=True)
class ProcessIdentity:
    """One process among those of a job.

    Attributes:
        rank: global rank.
        world_size: number of processes.
        local_rank: rank among the processes of this node.
        local_world_size: processes of this node.
        master_address: host of rank 0.
        master_port: its port for the rendezvous.
        job_times: of the scheduler's job, if this is one; known on rank 0.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_address: str
    master_port: int
    job_times: JobTimes = field(default_factory=JobTimes)

    def export(self) -> None:
        """Sets the environment that torch.distributed reads."""
        os.environ.update(
            RANK=str(self.rank),
            WORLD_SIZE=str(self.world_size),
            LOCAL_RANK=str(self.local_rank),
            LOCAL_WORLD_SIZE=str(self.local_world_size),
            MASTER_ADDR=self.master_address,
            MASTER_PORT=str(self.master_port),
        )


@dataclass(frozen=True)
class RankResult:
    """How a process ended.

    Attributes:
        status: exit status: 0 complete, 143 stopped by a signal after saving, 2 a user's mistake.
        error: message for the user, if any.
    """

    status: int
    error: str | None = None


def prepare_process(identity: ProcessIdentity, cpu_threads: int | None = None) -> None:
    """Sets up environment, threads and warnings; before anything imports Megatron-core or DeepSpeed.

    Args:
        identity: this process.
        cpu_threads: threads on CPU; default: this process's share of the cores.
    """
    _quiet_libraries()
    identity.export()
    import torch

    if not torch.cuda.is_available():
        keep_freed_memory()
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(cpu_threads or max(1, cores // identity.local_world_size))


def _quiet_libraries() -> None:
    """Hides import-time warnings about optional libraries that this project does not use."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", module=r"megatron\.core|torch\.jit|torch\.distributed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
