"""Which rank this process is, from the environment that torchrun or srun gives its processes."""

import random
import re
import socket
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime

from parallel.errors import ConfigurationError
from train.process import ProcessIdentity
from train.startup import JobTimes

LOCAL_ADDRESS = "127.0.0.1"
DEFAULT_PORT = 29500
# Below the range from which systems hand out ports by themselves.
FIRST_PORT, NUM_PORTS = 10_000, 20_000
SQUEUE_SECONDS = 30.0


def identity_from_environment(environment: Mapping[str, str]) -> ProcessIdentity | None:
    """This process's identity if torchrun or srun started it.

    Raises:
        ConfigurationError: the job spans several nodes and the first one's name cannot be told.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return ProcessIdentity(
            rank=int(environment["RANK"]),
            world_size=int(environment["WORLD_SIZE"]),
            local_rank=int(environment.get("LOCAL_RANK", 0)),
            local_world_size=int(environment.get("LOCAL_WORLD_SIZE", 1)),
            master_address=environment.get("MASTER_ADDR", LOCAL_ADDRESS),
            master_port=int(environment.get("MASTER_PORT", DEFAULT_PORT)),
        )
    # A batch script, too, has SLURM_PROCID, but no step.
    if "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment:
        return _slurm_identity(environment)
    return None


def _slurm_identity(environment: Mapping[str, str]) -> ProcessIdentity:
    world_size = int(environment.get("SLURM_NTASKS", 1))
    job = int(environment.get("SLURM_JOB_ID", 0))
    return ProcessIdentity(
        rank=int(environment["SLURM_PROCID"]),
        world_size=world_size,
        local_rank=int(environment.get("SLURM_LOCALID", 0)),
        local_world_size=_tasks_on_this_node(environment, world_size),
        master_address=environment.get("MASTER_ADDR") or _first_node(environment),
        master_port=int(environment.get("MASTER_PORT") or FIRST_PORT + job % NUM_PORTS),
        job_times=job_times(environment) if int(environment["SLURM_PROCID"]) == 0 else JobTimes(),
    )


def job_id(environment: Mapping[str, str]) -> str:
    """This job as Slurm's commands name it: a bare number would mean all tasks of the array that it is the last of."""
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment.get("SLURM_JOB_ID", "0")


def job_times(environment: Mapping[str, str]) -> JobTimes:
    """When Slurm got, started and will end this job; older versions do not set the latter, so squeue is asked."""
    command = ["squeue", "--noheader", f"--jobs={job_id(environment)}", "--format=%V %S %e"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=SQUEUE_SECONDS, check=True).stdout
        submitted, started, end = map(_timestamp, answer.split())
    except (OSError, subprocess.SubprocessError, ValueError):
        submitted = started = end = None
    known = environment.get("SLURM_JOB_END_TIME", "")
    return JobTimes(submitted, started, float(known) if known.isdecimal() else end)


def _timestamp(text: str) -> float | None:
    """Unix time of Slurm's local time; None for its `N/A` and `NONE`."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def _tasks_on_this_node(environment: Mapping[str, str], world_size: int) -> int:
    """Reads counts per node such as `8(x2),4`; without them, the tasks are taken to be spread evenly."""
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"):
        counts: list[int] = []
        for count, repeats in re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get(name, "")):
            counts += [int(count)] * int(repeats or 1)
        node = int(environment.get("SLURM_NODEID", 0))
        if counts:
            return counts[min(node, len(counts) - 1)]
    return max(1, world_size // _num_nodes(environment))


def _num_nodes(environment: Mapping[str, str]) -> int:
    return int(environment.get("SLURM_STEP_NUM_NODES") or environment.get("SLURM_NNODES") or 1)


def _first_node(environment: Mapping[str, str]) -> str:
    """Host of rank 0: the first of a list such as `gpu[03-04,09]`."""
    if _num_nodes(environment) == 1:
        return LOCAL_ADDRESS
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""
    first = re.fullmatch(r"([^\[\],]+)(?:\[(\d+)[^\]]*\])?(?:,.*)?", nodes)
    if first is None:
        raise ConfigurationError(
            f"MASTER_ADDR is not set and the host of rank 0 cannot be read from the node list {nodes!r}; set it to the "
            "first of `scontrol show hostnames`"
        )
    return first[1] + (first[2] or "")


def free_port() -> int:
    """A TCP port that is free on this machine now, and that the system gives to nobody meanwhile."""
    while True:
        with socket.socket() as listener, suppress(OSError):
            port = random.randrange(FIRST_PORT, FIRST_PORT + NUM_PORTS)
            listener.bind((LOCAL_ADDRESS, port))
            return port
