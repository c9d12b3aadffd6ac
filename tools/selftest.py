"""Tests every parallel layout on this machine or cluster against an unsharded model: tools/selftest.py [--cases TEXT].

Start it with as many processes as the layouts need (1, 2, 4 or 8):
    python tools/selftest.py
    torchrun --nproc-per-node 4 tools/selftest.py
    srun --nodes 2 --ntasks-per-node 4 --gpus-per-node 4 python tools/selftest.py
"""

import sys
from pathlib import Path

# Run as a script, the first entry of sys.path is this folder; the repository root must stand there instead.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import os

from parallel.errors import ConfigurationError
from slurm.identity import LOCAL_ADDRESS, free_port, identity_from_environment
from tools.command_line import USER_ERROR_STATUS, run
from train.process import ProcessIdentity, prepare_process


def main() -> int:
    """Runs the cases for this number of processes; status 1 if any fails."""
    parser = argparse.ArgumentParser(
        description="Compares losses, gradient norms, gradients and weights of every parallel layout with an unsharded "
        "model, over a few optimizer steps of a small model. Start it with torchrun or srun; alone it is one process."
    )
    parser.add_argument("--cases", default="", metavar="TEXT", help="only the cases whose name contains this")
    arguments = parser.parse_args()
    identity = identity_from_environment(os.environ)
    alone = ProcessIdentity(0, 1, 0, 1, LOCAL_ADDRESS, free_port())
    return run_selftest(identity or alone, arguments.cases)


def run_selftest(identity: ProcessIdentity, part: str) -> int:
    """Joins the other processes, runs the cases, prints them on rank 0; every rank gives the same status."""
    prepare_process(identity)
    import torch.distributed

    from parallel.topology import start_process_group
    from train.rank_zero import on_rank_zero
    from train.selftest import run_matrix
    from train.selftest_report import result_line, result_table, select_cases

    # Tolerances are those of fp32, which TF32 is not.
    torch.set_float32_matmul_precision("highest")
    try:
        cases = select_cases(identity.world_size, part)
    except ConfigurationError:
        if identity.rank > 0:
            return USER_ERROR_STATUS  # the message comes once
        raise
    start_process_group()
    try:
        comparisons = run_matrix(cases, report=lambda comparison: print(result_line(comparison), flush=True))
        if identity.rank == 0:
            print(f"\n{result_table(comparisons)}", flush=True)
        return int(not on_rank_zero(lambda: all(comparison.passed for comparison in comparisons)))
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run(main, ConfigurationError)
