"""What one process of a training job does."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from train.config import RunConfig
from train.process import STOPPED_STATUS, USER_ERROR_STATUS, ProcessIdentity, RankResult, prepare_process
from train.requests import Requests
from train.startup import StartupClock
from train.stop_signals import StopSignals

if TYPE_CHECKING:
    from train.evaluator import Evaluator


def train_rank(
    config: RunConfig, identity: ProcessIdentity, make_evaluator: "Callable[[], Evaluator | None]"
) -> RankResult:
    """Joins the job, trains until done or stopped, and leaves.

    Args:
        config: the run.
        identity: this process.
        make_evaluator: called when the ranks have met and before anything is loaded; what it gives runs the tasks.

    Returns:
        How it ended; user errors are returned, not raised.
    """
    signals = StopSignals()
    prepare_process(identity, config.train.cpu_threads)
    clock = StartupClock(identity.job_times)
    # Imported here: they take seconds, and the environment must be set before.
    import torch

    from parallel.topology import initialize_topology, start_process_group
    from train.rank_zero import USER_ERRORS, on_every_rank
    from train.trainer import Ending, Trainer

    clock.reached("imports")
    try:
        start_process_group()
        place = initialize_topology(config.parallel)
        margin = config.stability.stop_before_end_seconds
        requests = Requests(config.directory, signals, identity.job_times.end, margin, watches_files=place.rank == 0)
        clock.reached("rendezvous")
        evaluator = on_every_rank(make_evaluator)
        if evaluator is not None:
            clock.reached("tasks")
        outcome = Trainer(config, place, requests, clock=clock, evaluator=evaluator).run()
    except USER_ERRORS as error:
        return RankResult(USER_ERROR_STATUS, str(error))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        signals.restore()
    if identity.rank == 0:
        print(f"run {config.run.name}: {outcome.ending.value} at step {outcome.step}", flush=True)
    return RankResult(STOPPED_STATUS if outcome.ending is Ending.STOPPED else 0)
