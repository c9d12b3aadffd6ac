"""Checks a job's nodes before a run starts: `srun python -m slurm.preflight RUN_FOLDER --nodes A,B ...`.

Every node must have the same code and packages, see its GPUs, share the run's folder and its free space, and tell the
time alike; then an all-reduce over all tasks is timed. Rank 0 prints the verdict and ends with status 3 if it is bad;
nodes that do not answer are named, with status 1.
"""

import argparse
import json
import os
import secrets
import socket
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from slurm.node_facts import (
    MAXIMUM_SKEW_SECONDS,
    NodeFacts,
    find_mark,
    free_bytes,
    leave_mark,
    problems,
    skew,
    software,
)

if TYPE_CHECKING:
    from torch.distributed import Store

BAD_NODE_STATUS, NO_ANSWER_STATUS = 3, 1
RESERVE_SECONDS = 15.0  # of the time given, for what follows the nodes' answers
FAREWELL_SECONDS = 2.0
POLL_SECONDS = 0.05


class PreflightError(Exception):
    """The allocation cannot be used; the message names the node.

    Args:
        message: why.
        status: exit status: 3 if a restart would meet it again, 1 if it may not.
    """

    def __init__(self, message: str, status: int = BAD_NODE_STATUS) -> None:
        super().__init__(message)
        self.status = status


class Preflight:
    """One task's part of the checks.

    Args:
        options: the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        from torch.distributed import TCPStore

        self.options = options
        self.nodes: list[str] = options.nodes.split(",")
        self.rank, self.world = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
        self.is_first_of_node = os.environ.get("SLURM_LOCALID", "0") == "0"
        self.node_number = int(os.environ.get("SLURM_NODEID", "0"))
        self.mark, self.token = f".preflight-{os.environ.get('SLURM_JOB_ID', '0')}", secrets.token_hex(8)
        self.problem = None
        if self.rank == 0:
            self.problem = leave_mark(options.run, self.mark, self.token)
        self.deadline = time.monotonic() + options.seconds - RESERVE_SECONDS
        self.store: Store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=self.rank == 0,
            timeout=timedelta(seconds=options.seconds),
            wait_for_workers=False,
        )

    def run(self) -> None:
        """Checks the nodes, then the network between them.

        Raises:
            PreflightError: on rank 0 only, something is wrong.
        """
        if self.rank == 0:
            self.store.set("token", self.token)
        if self.is_first_of_node:
            self._answer()
        if self.rank == 0:
            self._announce()
        elif self.store.get("verdict"):
            self.store.set(f"left/{self.rank}", "")
            return
        self._measure()

    def _answer(self) -> None:
        """Tells rank 0 what this node is like, and when asked, what time it is here."""
        import torch

        run = self.options.run
        token = self.store.get("token").decode()
        problem = self.problem
        if self.rank:
            problem = leave_mark(run, f"{self.mark}-{self.rank}", token) or find_mark(run, self.mark, token)
            with suppress(OSError):
                (run / f"{self.mark}-{self.rank}").unlink()
        facts = NodeFacts(socket.gethostname(), software(), torch.cuda.device_count(), free_bytes(run), problem)
        self.store.set(f"facts/{self.node_number}", json.dumps(asdict(facts)))
        if self.rank:
            self.store.wait(["what time is it"])
            self.store.set(f"time/{self.node_number}", str(time.time()))

    def _announce(self) -> None:
        """Tells all tasks whether the nodes are good; the store stays until those that answer have heard it.

        Raises:
            PreflightError: they are not.
        """
        try:
            self._judge()
        except PreflightError as error:
            self.store.set("verdict", str(error))
            end = time.monotonic() + FAREWELL_SECONDS
            while time.monotonic() < end and not self.store.check([f"left/{rank}" for rank in range(1, self.world)]):
                time.sleep(POLL_SECONDS)
            raise
        self.store.set("verdict", "")

    def _judge(self) -> None:
        """Compares the nodes.

        Raises:
            PreflightError: one is not as it should be, or does not answer.
        """
        answers = self._collect("facts", range(len(self.nodes)))
        with suppress(OSError):
            (self.options.run / self.mark).unlink()
        facts = [NodeFacts(**json.loads(answer)) for answer in answers]
        found = problems(facts, self.options.gpus, self.options.parameters)
        sent = time.time()
        self.store.set("what time is it", "?")
        times = self._collect("time", range(1, len(self.nodes)))
        received = time.time()
        for one, there in zip(facts[1:], map(float, times), strict=True):
            if (off := skew(sent, there, received)) > MAXIMUM_SKEW_SECONDS:
                found.append(f"node {one.node} has a clock that differs by {off:.0f} s from that of {facts[0].node}")
        if found:
            raise PreflightError("; ".join(found))

    def _collect(self, name: str, numbers: range) -> list[str]:
        """The values of all nodes; names those that did not give theirs."""
        missing = set(numbers)
        while missing:
            missing -= {number for number in missing if self.store.check([f"{name}/{number}"])}
            if missing and time.monotonic() > self.deadline:
                silent = ", ".join(f"node {self.nodes[number]}" for number in sorted(missing))
                raise PreflightError(f"{silent} did not answer within {self.options.seconds:g} s", NO_ANSWER_STATUS)
            time.sleep(POLL_SECONDS)
        return [self.store.get(f"{name}/{number}").decode() for number in numbers]

    def _measure(self) -> None:
        """Times the all-reduce; if it is too slow, also the way to each node.

        Raises:
            PreflightError: on rank 0, it is too slow.
        """
        from slurm.bandwidth import Network

        speed, problem = None, ""
        minimum = self.options.minimum_gbps
        with Network(self.store, self.rank, self.world, RESERVE_SECONDS) as network:
            if self.world > 1:
                speed = network.all_reduce_gbps()
                if speed < minimum:
                    node, slowest = network.slowest_node(self.nodes)
                    problem = (
                        f"node {node} is reached with {slowest:.2f} GB/s, and all-reduces over {self.world} tasks with "
                        f"{speed:.2f} GB/s, less than SITE_MIN_ALLREDUCE_GBPS={minimum:g}"
                    )
        if self.rank == 0:
            if problem:
                raise PreflightError(problem)
            measured = f"; all-reduce over {self.world} tasks: {speed:.2f} GB/s" if speed is not None else ""
            print(f"preflight: {len(self.nodes)} nodes alike, {self.options.gpus} GPUs on each{measured}", flush=True)


def main() -> int:
    """Runs the checks; the exit status is that of rank 0, so that the others do not take it away first."""
    parser = argparse.ArgumentParser(description="Checks the nodes of a Slurm job; started by the job scripts.")
    parser.add_argument("run", type=Path, help="the run's folder, which exists")
    parser.add_argument("--nodes", required=True, help="names of the job's nodes in order, with commas between")
    parser.add_argument("--seconds", type=float, default=60.0, help="for everything (default: 60)")
    parser.add_argument("--gpus", type=int, default=0, help="of each node")
    parser.add_argument("--parameters", type=int, default=0, help="of the model")
    parser.add_argument("--minimum-gbps", type=float, default=0.0, help="of the all-reduce; 0: any")
    options = parser.parse_args()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch is imported: only our own sentences
    try:
        Preflight(options).run()
    except PreflightError as error:
        print(f"error: preflight: {error}", file=sys.stderr, flush=True)
        return error.status
    except Exception as error:  # whatever a broken node does must come with its name
        print(f"error: preflight: node {socket.gethostname()}: {error}", file=sys.stderr, flush=True)
        return NO_ANSWER_STATUS if os.environ.get("SLURM_PROCID") == "0" else 0
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # threads of a broken process group must not hold the job
