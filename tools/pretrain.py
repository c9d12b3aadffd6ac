"""Trains a model: tools/pretrain.py CONFIG [section.field=value ...] [--launcher auto|local|inline] [--dry-run]."""

import sys
from pathlib import Path

# Run as a script, the first entry of sys.path is this folder; the repository root must stand there instead.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse

from checkpoints.errors import CheckpointError
from data.errors import DataError
from parallel.errors import ConfigurationError
from tools.command_line import run
from train.config_file import load_config
from train.report import dry_run_report


def main() -> int:
    """Starts or resumes the run; returns its exit status."""
    parser = argparse.ArgumentParser(
        description="Trains a model. The same command resumes an interrupted run from its newest checkpoint."
    )
    parser.add_argument("config", type=Path, help="YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="changes to the configuration")
    parser.add_argument(
        "--launcher",
        choices=("auto", "local", "inline"),
        default="auto",
        help="local: start all processes on this machine; inline: be one rank of a torchrun or srun job; "
        "auto: whichever fits (default)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would run and exit")
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.config, arguments.overrides)
    if arguments.dry_run:
        print(dry_run_report(config))
        return 0
    from slurm.launch import launch  # imports Submitit and the checkpoint store, which a dry run does not need

    return launch(config, arguments.launcher)


if __name__ == "__main__":
    run(main, ConfigurationError, DataError, CheckpointError)
