"""What each process of a submitted job does: Submitit unpickles a TrainingJob there and calls it."""

import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import submitit
from submitit.helpers import DelayedSubmission

from checkpoints.errors import CheckpointError
from data.errors import DataError
from parallel.errors import ConfigurationError
from slurm.identity import identity_from_environment
from slurm.leaving import keep_status
from slurm.local import CRASH_STATUS
from slurm.task_evaluation import prepare_tasks
from train.config import RunConfig
from train.process import USER_ERROR_STATUS, RankResult
from train.worker import train_rank


@dataclass(frozen=True)
class TrainingJob:
    """A run, or what is left of it: its newest checkpoint says where it goes on, never this object.

    A process that returns has completed the run. After any other end it leaves with a status, by which the batch script
    decides whether to put the job back (slurm/requeue.py): stopped by a signal, all ranks first agree, save, and leave
    with 143. So a job is put back in one place only, and no result of a process is left over from an earlier attempt.

    Attributes:
        config: the run.
        prepare: called on every rank before training.
    """

    config: RunConfig
    prepare: Callable[[], None] | None = None

    def __call__(self) -> RankResult:
        """Trains this process's part.

        Raises:
            SystemExit: the run is not complete.
        """
        submitit.JobEnvironment().paths.result_pickle.unlink(missing_ok=True)
        result = self._run()
        if result.error:
            print(f"error: {result.error}", file=sys.stderr, flush=True)
        if result.status:
            keep_status()
            sys.exit(result.status)
        return result

    def _run(self) -> RankResult:
        try:
            identity = identity_from_environment(os.environ)
            assert identity is not None, "srun starts this"
            if self.prepare is not None:
                self.prepare()
            return train_rank(self.config, identity, partial(prepare_tasks, self.config))
        except (ConfigurationError, DataError, CheckpointError) as error:
            return RankResult(USER_ERROR_STATUS, str(error))
        except Exception:
            traceback.print_exc()
            return RankResult(CRASH_STATUS)

    def checkpoint(self) -> DelayedSubmission:
        """What Submitit puts back if a signal comes before training listens to signals."""
        return DelayedSubmission(self)
