"""What one process of a training job does."""

import logging
import os
import sys
import warnings
from dataclasses import dataclass

from train.config import RunConfig
from train.stop_signals import StopSignals

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
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_address: str
    master_port: int

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


def train_rank(config: RunConfig, identity: ProcessIdentity) -> RankResult:
    """Joins the job, trains until done or stopped, and leaves.

    Args:
        config: the run.
        identity: this process.

    Returns:
        How it ended; user errors are returned, not raised.
    """
    signals = StopSignals()
    prepare_process(identity, config.train.cpu_threads)
    # Imported here: they take seconds, and the environment must be set before.
    import torch

    from parallel.topology import initialize_topology, start_process_group
    from train.rank_zero import USER_ERRORS
    from train.trainer import Ending, Trainer

    try:
        start_process_group()
        outcome = Trainer(config, initialize_topology(config.parallel), signals).run()
    except USER_ERRORS as error:
        return RankResult(USER_ERROR_STATUS, str(error))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        signals.restore()
    if identity.rank == 0:
        print(f"run {config.run.name}: {outcome.ending.value} at step {outcome.step}", flush=True)
    return RankResult(0 if outcome.ending is Ending.COMPLETE else STOPPED_STATUS)


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
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(cpu_threads or max(1, cores // identity.local_world_size))


def _quiet_libraries() -> None:
    """Hides import-time warnings about optional libraries that this project does not use."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", module=r"megatron\.core|torch\.jit|torch\.distributed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
