"""Turns a vanilla model into a Block Transformer: tools/uptrain_from_vanilla.py --vanilla DIR --config CONFIG."""

import sys
from pathlib import Path

# Run as a script, the first entry of sys.path is this folder; the repository root must stand there instead.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import os
import warnings

# Megatron-core warns at import about optional libraries that this project does not use.
warnings.filterwarnings("ignore", module=r"megatron\.core")

from checkpoints.errors import CheckpointError
from checkpoints.uptraining.initial_weights import UptrainingOptions
from checkpoints.uptraining.layer_assignment import METHODS
from data.errors import DataError
from parallel.errors import ConfigurationError
from slurm.identity import identity_from_environment
from slurm.task_evaluation import prepare_tasks
from tools.command_line import exit_on_termination, run
from train.config_file import load_config
from train.report import dry_run_report
from train.uptraining import FOLDER, check_source, uptraining_runs

NEEDED = (
    "give the vanilla weights and the target: python tools/uptrain_from_vanilla.py --vanilla DIR --config CONFIG; DIR "
    "is a Hugging Face folder with config.json and *.safetensors (GPT-NeoX, Llama, Mistral, Qwen2, Qwen3) or a vanilla "
    "run such as runs/vanilla_160, CONFIG for example configs/paper/block_uptrain_b4_85_10.yaml"
)


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Trains a Block Transformer from the weights of a vanilla model, in a fraction of the steps; the "
        "same command resumes. See docs/uptraining.md."
    )
    add = parser.add_argument
    add("--vanilla", type=Path, metavar="DIR", help="Hugging Face folder, or a vanilla run of ours")
    add("--config", type=Path, metavar="CONFIG", help="YAML file of the target, with its full schedule")
    add("overrides", nargs="*", metavar="section.field=value", help="changes to the configuration")
    add("--fraction", type=float, default=0.1, help="part of the schedule's steps to train (default: 0.1)")
    add("--layers", choices=METHODS, default="partition", help="assignment of layers (default: partition)")
    add(
        "--token-embeddings",
        choices=("copied", "computed"),
        default="copied",
        help="of the token decoder: the vanilla table, or each token's state before the token decoder's first layer",
    )
    add("--block-lengths", metavar="1,2,4", help="grow the blocks in stages that share the steps")
    add("--launcher", choices=("auto", "local", "inline", "slurm"), default="auto", help="see tools/pretrain.py")
    add("--wait", action="store_true", help="with --launcher slurm: wait until the jobs have ended")
    add("--dry-run", action="store_true", help="check everything, print what would run, and exit")
    return parser.parse_intermixed_args()


def lengths(text: str | None) -> list[int]:
    """Block lengths from `1,2,4`.

    Raises:
        ConfigurationError: it is no list of positive numbers.
    """
    parts = text.split(",") if text else []
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ConfigurationError(f"--block-lengths {text} is not a list of positive numbers such as 1,2,4")
    return [int(part) for part in parts]


def main() -> int:
    """Prepares and trains; returns the exit status."""
    arguments = parse_arguments()
    if arguments.vanilla is None or arguments.config is None:
        raise ConfigurationError(NEEDED)
    if arguments.wait and arguments.launcher != "slurm":
        raise ConfigurationError("--wait is for --launcher slurm; the other launchers always wait")
    config = load_config(arguments.config, arguments.overrides)
    vanilla = arguments.vanilla.absolute()
    options = UptrainingOptions(arguments.layers, arguments.token_embeddings, config.run.seed)
    runs = uptraining_runs(config, arguments.fraction, lengths(arguments.block_lengths))
    identity = identity_from_environment(os.environ)
    is_first = identity is None or identity.rank == 0
    if arguments.dry_run or not (runs[0].directory / FOLDER).is_dir():
        origins = check_source(vanilla, runs[0], options)
        if arguments.dry_run:
            for one in runs:
                prepare_tasks(one)
            print("\n".join(dry_run_report(one) for one in runs))
        if is_first:
            print("\n".join(f"{name} <- {origin}" for name, origin in origins), flush=True)
    if arguments.dry_run:
        return 0
    exit_on_termination()
    from slurm.uptraining import launch_uptraining  # imports Submitit, which a dry run does not need

    return launch_uptraining(runs, vanilla, options, arguments.launcher, arguments.wait)


if __name__ == "__main__":
    run(main, ConfigurationError, DataError, CheckpointError)
