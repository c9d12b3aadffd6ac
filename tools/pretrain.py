"""Trains a model: tools/pretrain.py CONFIG [section.field=value ...] [--launcher auto|local|inline|slurm]."""

import sys
from pathlib import Path

# Run as a script, the first entry of sys.path is this folder; the repository root must stand there instead.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse

from checkpoints.errors import CheckpointError
from data.errors import DataError
from parallel.errors import ConfigurationError
from slurm.sweep import sweep_runs
from slurm.task_evaluation import prepare_tasks
from tools.command_line import run
from train.config_file import load_config
from train.report import dry_run_report


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Trains a model. The same command resumes an interrupted run from its newest checkpoint."
    )
    add = parser.add_argument
    add("config", type=Path, help="YAML file, see configs/")
    add("overrides", nargs="*", metavar="section.field=value", help="changes to the configuration")
    add(
        "--launcher",
        choices=("auto", "local", "inline", "slurm"),
        default="auto",
        help="local: start all processes on this machine; inline: be one rank of a torchrun or srun job; slurm: submit "
        "a job, see docs/cluster.md; auto: inline inside torchrun or srun, else local (default)",
    )
    add("--wait", action="store_true", help="with --launcher slurm: show the log until the job has ended")
    add(
        "--sweep",
        type=Path,
        metavar="FILE",
        help="several runs: a YAML list of points such as {run.name: a, optimizer.learning_rate: 1.0e-3}; with "
        "--launcher slurm one job array, else one run after another",
    )
    add("--at-once", type=int, metavar="N", help="with --sweep: how many runs of the array may run at the same time")
    add("--dry-run", action="store_true", help="print what would run and exit")
    return parser.parse_intermixed_args()


def check_arguments(arguments: argparse.Namespace) -> None:
    """Checks that the options fit each other.

    Raises:
        ConfigurationError: they do not.
    """
    if arguments.wait and arguments.launcher != "slurm":
        raise ConfigurationError("--wait is for --launcher slurm; the other launchers always wait")
    if arguments.at_once is not None and (arguments.sweep is None or arguments.launcher != "slurm"):
        raise ConfigurationError("--at-once is for --sweep with --launcher slurm; leave it out")
    if arguments.at_once is not None and arguments.at_once < 1:
        raise ConfigurationError(f"--at-once {arguments.at_once} is not a positive number")


def main() -> int:
    """Starts or resumes the run; returns its exit status."""
    arguments = parse_arguments()
    check_arguments(arguments)
    if arguments.sweep is None:
        configs = [load_config(arguments.config, arguments.overrides)]
    else:
        configs = sweep_runs(arguments.config, arguments.overrides, arguments.sweep)
    if arguments.dry_run:
        for config in configs:
            prepare_tasks(config)
        print("\n".join(map(dry_run_report, configs)))
        return 0
    from slurm.launch import launch, launch_sweep  # imports Submitit, which a dry run does not need

    if arguments.sweep is None:
        return launch(configs[0], arguments.launcher, arguments.wait)
    name = arguments.sweep.stem
    return launch_sweep(configs, arguments.launcher, name, arguments.at_once, arguments.wait)


if __name__ == "__main__":
    run(main, ConfigurationError, DataError, CheckpointError)
