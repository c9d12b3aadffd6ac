"""Measures how fast models generate: tools/measure_throughput.py MODEL [MODEL ...] --output DIR."""

import sys
from pathlib import Path

# Run as a script, the first entry of sys.path is this folder; the repository root must stand there instead.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import warnings

# Megatron-core warns at import about optional libraries that this project does not use.
warnings.filterwarnings("ignore", module=r"megatron\.core")

import torch
import torch.distributed

from checkpoints.errors import CheckpointError
from checkpoints.trained_model import find_trained_model
from evaluation.throughput.records import RecordFile
from evaluation.throughput.report import draw_throughput, measurement_table, walltime_table
from evaluation.throughput.study import Candidate, Setting, Study
from inference.errors import InferenceError
from parallel.config import ParallelConfig
from parallel.cpu_adaptation import compute_device
from parallel.device_limits import measure_device_limits
from parallel.errors import ConfigurationError
from parallel.stage import build_stage
from parallel.topology import start_single_process
from tools.command_line import make_output_folder, positive, run
from tools.precision import add_precision, chosen_dtype
from train.config_file import load_config


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Generates random tokens greedily from random prompts with one model after the other, and writes "
        "tokens per second, memory, the time of each component and the distance from what the device can do as a "
        "table, a CSV file and plots. What the CSV file already holds is not measured again."
    )
    add = parser.add_argument
    add("models", nargs="+", type=Path, metavar="MODEL", help="configuration (random weights), run or step folder")
    add(
        "--settings",
        nargs="+",
        type=setting,
        default=[Setting(2048, 128), Setting(128, 2048)],
        metavar="P/N",
        help="prompt and new tokens (default: the paper's 2048/128 and 128/2048)",
    )
    add(
        "--batch-sizes",
        nargs="+",
        type=positive,
        metavar="B",
        help="sequences at a time (default: up to the largest that fits)",
    )
    add("--largest", type=positive, default=2**16, metavar="B", help="largest batch size that is searched")
    add("--losses", nargs="+", type=float, metavar="L", help="a loss for each model, for a plot against loss")
    add("--repeats", type=positive, default=5, metavar="N", help="timed runs of each point (default 5)")
    add_precision(parser)
    add("--threads", type=positive, metavar="N", help="threads on CPU (default: torch's choice)")
    add("--output", type=Path, required=True, metavar="DIR", help="folder for throughput.csv, results.md and plots")
    return parser.parse_args()


def setting(text: str) -> Setting:
    """Two numbers with a slash between; at least two new tokens, so that there is decoding to measure."""
    prompt, _, new = text.partition("/")
    if not (prompt.isdigit() and new.isdigit() and int(prompt) > 0 and int(new) > 1):
        raise argparse.ArgumentTypeError(
            f"{text} is not PROMPT/NEW with at least 1 prompt token and 2 new ones, such as 128/2048"
        )
    return Setting(int(prompt), int(new))


def candidates(arguments: argparse.Namespace, dtype: torch.dtype) -> list[Candidate]:
    """The models to measure.

    Raises:
        ConfigurationError: the number of losses is another one, or two models have the same name.
    """
    losses = arguments.losses or [None] * len(arguments.models)
    if len(losses) != len(arguments.models):
        raise ConfigurationError(
            f"--losses has {len(losses)} values for {len(arguments.models)} models; give one for each"
        )
    found = [candidate(path, loss, dtype) for path, loss in zip(arguments.models, losses, strict=True)]
    names = [one.name for one in found]
    for name in names:
        if names.count(name) > 1:
            raise ConfigurationError(f"two models are called {name}; rename a file or folder")
    return found


def candidate(path: Path, loss: float | None, dtype: torch.dtype) -> Candidate:
    """A configuration with random weights, or a trained model."""
    if path.is_dir():
        trained = find_trained_model(path.absolute())
        name = trained.folder.name if path.absolute() != trained.path else f"{trained.folder.name}, {trained.path.name}"
        return Candidate(name, trained.model, lambda: trained.load(dtype=dtype), loss)
    config = load_config(path).model
    return Candidate(path.stem, config, lambda: build_stage(config, ParallelConfig(), dtype).eval(), loss)


def main() -> None:
    """Measures and reports."""
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    dtype = chosen_dtype(arguments.precision)
    models = candidates(arguments, dtype)
    make_output_folder(arguments.output)
    records = RecordFile(arguments.output / "throughput.csv")
    limits = measure_device_limits(compute_device(), dtype)
    print(limits.describe(), flush=True)
    study = Study(limits, records, arguments.repeats, tell=lambda line: print(line, file=sys.stderr, flush=True))
    largest = None if arguments.batch_sizes else arguments.largest
    start_single_process()
    try:
        splits = {
            model.name: study.run(model, arguments.settings, arguments.batch_sizes or (), largest) for model in models
        }
    finally:
        torch.distributed.destroy_process_group()
    measured = records.on(limits, {model.name: model.config for model in models})
    report = [limits.describe(), "", *measurement_table(measured)]
    for name, split in splits.items():
        report += ["", *walltime_table(name, split)]
    print("\n".join(report[2:]))
    (arguments.output / "results.md").write_text("\n".join(report) + "\n", encoding="utf-8")
    for plot in draw_throughput(arguments.output, measured, models, limits):
        print(f"drew {plot}")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="prompt and new tokens")
    run(main, CheckpointError, ConfigurationError, InferenceError)
