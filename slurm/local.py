"""Runs a job on this machine: all its processes through Submitit's local executor."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

import submitit

from parallel.errors import ConfigurationError
from parallel.extensions import check_communication_op
from slurm.identity import LOCAL_ADDRESS, free_port
from slurm.lost_ranks import LostRanks
from slurm.task_evaluation import prepare_tasks
from train.config import RunConfig
from train.process import INTERACTIVE, STOPPED_STATUS, USER_ERROR_STATUS, ProcessIdentity, RankResult
from train.run_directory import RunDirectory
from train.worker import train_rank

CRASH_STATUS = 1
KILLED_STATUS = 137
INTERRUPTED_STATUS = 130
POLL_SECONDS = 0.2
TRACE_RULE = "----------------------"  # what Submitit 1.5 puts around the traceback of a failed task
RESEND_SECONDS = 3.0
# Submitit's local executor ends a job at its time limit; a run has none.
NO_LIMIT_MINUTES = 60 * 24 * 365


def run_submitit_task(config: RunConfig, port: int, visible_gpus: str | None = None) -> RankResult:
    """One task of a Submitit job on one machine.

    Args:
        config: the run.
        port: where the tasks meet.
        visible_gpus: the launcher's CUDA_VISIBLE_DEVICES; Submitit would give the machine's first GPUs instead.
    """
    if visible_gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_gpus
    job = submitit.JobEnvironment()
    identity = ProcessIdentity(job.global_rank, job.num_tasks, job.local_rank, job.num_tasks, LOCAL_ADDRESS, port)
    return train_rank(config, identity, partial(prepare_tasks, config))


def run_local(config: RunConfig, directory: RunDirectory) -> int:
    """Runs all processes of a run here, and copies rank 0's log.

    Returns:
        Exit status; see slurm.launch.launch.

    Raises:
        ConfigurationError: this machine has too few GPUs or no compiler, or the run's folder cannot be written.
    """
    num_gpus = _visible_gpus(config.parallel.world_size)
    if not num_gpus:
        check_communication_op()
    executor = submitit.LocalExecutor(folder=directory.new_attempt())
    executor.update_parameters(
        tasks_per_node=config.parallel.world_size,
        gpus_per_node=num_gpus,
        timeout_min=NO_LIMIT_MINUTES,
        stderr_to_stdout=True,
    )
    _prepare_environment(config)
    with _stop_signals() as forwarder:
        job = executor.submit(run_submitit_task, config, free_port(), os.environ.get("CUDA_VISIBLE_DEVICES"))
        forwarder.watch(job)
        lost = LostRanks(job)
        _stream_log(job, forwarder, lost)
    return _summarize(job, forwarder.received, lost.found)


def _summarize(job: Any, received: signal.Signals | None, lost: set[int]) -> int:
    """Prints what went wrong, if anything, and gives the exit status; if ranks were lost, others are not to blame."""
    results = [_result(job.task(rank), rank) for rank in sorted(lost) or range(job.num_tasks)]
    statuses = {result.status for result in results}
    if received and (statuses == {0} or statuses <= {STOPPED_STATUS, KILLED_STATUS}):
        print(_what_was_stopped(statuses), file=sys.stderr)
        return INTERRUPTED_STATUS if received is signal.SIGINT else STOPPED_STATUS
    for error in dict.fromkeys(result.error for result in results if result.error):
        print(f"error: {error}", file=sys.stderr)
    worst_first = (USER_ERROR_STATUS, CRASH_STATUS, KILLED_STATUS, STOPPED_STATUS)
    return next((status for status in worst_first if status in statuses), 0)


def _what_was_stopped(statuses: set[int]) -> str:
    if statuses == {0}:
        return "stopped; this run was complete"  # what would follow, such as a sweep's next run, must not start
    return "stopped; the same command goes on from here" if STOPPED_STATUS in statuses else "stopped at the start"


def _result(task: Any, rank: int) -> RankResult:
    """How a task ended, also if it did not live to say so."""
    try:
        result: RankResult = task.result()
    except submitit.core.utils.FailedJobError as error:
        trace = str(error).split(TRACE_RULE)[1].strip()
        reason = trace.splitlines()[-1]
        return RankResult(CRASH_STATUS, f"rank {rank} failed: {reason} (log: {task.paths.stdout})")
    except submitit.core.utils.UncompletedJobError:
        return RankResult(KILLED_STATUS, f"rank {rank} was killed (log: {task.paths.stdout})")
    return result


def _visible_gpus(needed: int) -> int:
    """GPUs to give to the job: none on a CPU machine, else one per process."""
    import torch

    available = torch.cuda.device_count()
    if 0 < available < needed:
        raise ConfigurationError(
            f"the layout needs {needed} GPUs, this machine has {available}; lower parallel.data, "
            "parallel.tensor or parallel.pipeline, or start it on a cluster"
        )
    return needed if available else 0


def _prepare_environment(config: RunConfig) -> None:
    """Environment of the tasks, which Submitit copies from this process."""
    root = str(Path(__file__).resolve().parent.parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    os.environ["PYTHONSAFEPATH"] = "1"  # a folder named like one of our packages in the working directory must not win
    os.environ[INTERACTIVE] = str(int(sys.stdout.isatty()))
    cores = len(os.sched_getaffinity(0))
    threads = config.train.cpu_threads or max(1, cores // config.parallel.world_size)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))


class _StopForwarder:
    """Passes a stop signal on to the job, which saves and leaves.

    It is sent again now and then: one that arrives while the ranks are starting would be lost, and further ones change
    nothing.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._job: Any = None
        self._sent = 0.0

    def watch(self, job: Any) -> None:
        """From now on signals go to this job, also one that came before."""
        self._job = job
        signal.signal(signal.SIGINT, self.handle)
        self.forward()

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """Signal handler."""
        first = self.received is None
        self.received = signal.Signals(number)
        self.forward()
        if first:
            with suppress(OSError):  # the terminal may be gone
                print("\nstopping: saving a checkpoint first, please wait", file=sys.stderr, flush=True)

    def forward(self) -> None:
        """Sends a received signal to the job, unless that was done a moment ago."""
        due = time.monotonic() - self._sent > RESEND_SECONDS
        if self.received and due and self._job is not None and not self._job.done():
            self._sent = time.monotonic()
            self._job._process.send_signal(signal.SIGTERM)


@contextmanager
def _stop_signals() -> Iterator[_StopForwarder]:
    """Ctrl-C, SIGTERM and SIGHUP end the job gently, not this process.

    SIGINT is ignored while the job starts: its processes inherit that, so that Ctrl-C in a terminal does not make
    Submitit's controller kill the ranks before they have saved.
    """
    forwarder = _StopForwarder()
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGTERM, forwarder.handle)
    signal.signal(signal.SIGHUP, forwarder.handle)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield forwarder
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stream_log(job: Any, forwarder: _StopForwarder, lost: LostRanks) -> None:
    """Copies rank 0's log as it grows, until the job has ended."""
    path = job.task(0).paths.stdout if job.num_tasks > 1 else job.paths.stdout
    while not path.exists() and not job.done():
        forwarder.forward()
        lost.look()
        time.sleep(POLL_SECONDS)
    if not path.exists():
        return
    with path.open("rb") as log:
        while True:
            ended = job.done()
            _copy(log, forwarder)
            if ended:
                return
            forwarder.forward()
            lost.look()
            time.sleep(POLL_SECONDS)


def _copy(log: BinaryIO, forwarder: "_StopForwarder") -> None:
    """Copies what is there; if nobody reads it any more, the job is stopped as by a hang-up, not left behind."""
    while block := log.read(1 << 16):
        try:
            sys.stdout.buffer.write(block)
            sys.stdout.buffer.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            forwarder.handle(signal.SIGHUP, None)
