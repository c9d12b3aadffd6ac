"""Compares ways to a Block Transformer: benchmarks/uptraining_study.py --train-input FILES --validation-input FILES."""

import sys
from pathlib import Path

# Run as a script, the first entry of sys.path is this folder; the repository root must stand there instead.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import importlib.util
import json
import os
import subprocess
import time
from collections.abc import Sequence

from benchmarks.uptraining.execution import StudyError, run_all
from benchmarks.uptraining.plan import CONFIGS, REPOSITORY, Study
from benchmarks.uptraining.statistics import position_table, read_results, results_as_json, table
from data.errors import DataError
from data.files import write_atomically
from data.preparation.documents import read_documents
from parallel.errors import ConfigurationError
from tools.command_line import exit_on_termination, run
from train.config_file import load_config


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Trains a vanilla model and Block Transformers from it and from scratch, with several seeds, and "
        "compares their validation losses. The same command goes on after an interruption. See docs/uptraining.md."
    )
    add = parser.add_argument
    add("--train-input", nargs="+", type=Path, required=True, metavar="FILE", help="text for training")
    add("--validation-input", nargs="+", type=Path, required=True, metavar="FILE", help="held-out text")
    add("--output", type=Path, default=REPOSITORY / "runs" / "uptraining-study", metavar="DIR", help="folder for all")
    add("--seeds", type=int, default=3, metavar="N", help="seeds of each method (default 3)")
    add("--extra-seeds", type=int, metavar="N", help="seeds of the methods beyond the question (default: --seeds)")
    add("--jobs", type=int, default=2, metavar="N", help="runs at a time, each on one core (default 2)")
    add("--steps", type=int, metavar="N", help="steps of the full schedule (default: that of the configuration)")
    add(
        "--excerpt",
        type=int,
        default=20_000,
        metavar="N",
        help="characters from the middle of each held-out document that are evaluated (default 20000)",
    )
    return parser.parse_args()


def say(line: str) -> None:
    """Prints a line with the time."""
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def prepare(arguments: argparse.Namespace, output: Path, vocab_size: int) -> None:
    """Makes the tokenizer and the shards, unless they are there.

    Raises:
        DataError: an input cannot be read.
        StudyError: a tool failed.
    """
    tokenizer, excerpts = output / "tokenizer.model", output / "validation.jsonl"
    inputs = [str(path.absolute()) for path in arguments.train_input]
    if not excerpts.is_file():
        write_atomically(excerpts, _excerpts(arguments.validation_input, arguments.excerpt).encode())
    if not tokenizer.is_file():
        _call("train_tokenizer", "--input", *inputs, "--vocab-size", str(vocab_size), "--output", str(tokenizer))
    if not (output / "shards").is_dir():
        _call(
            *("prepare_data", "--input", *inputs, "--validation-input", str(excerpts)),
            *("--tokenizer", str(tokenizer), "--output", str(output / "shards")),
        )


def _excerpts(paths: Sequence[Path], characters: int) -> str:
    """The middle of each document, as JSON Lines: short, so that all documents count."""
    lines = []
    for path in paths:
        for text in read_documents(path):
            start = max(0, (len(text) - characters) // 2)
            lines.append(json.dumps({"text": text[start : start + characters]}, ensure_ascii=False))
    return "\n".join(lines) + "\n"


def _call(tool: str, *options: str) -> None:
    command = [sys.executable, str(REPOSITORY / "tools" / f"{tool}.py"), *options]
    status = subprocess.run(command).returncode
    if status:
        raise StudyError(f"tools/{tool}.py failed with status {status}")


def write_report(study: Study) -> None:
    """Writes the table, the plots and their numbers, and prints the table."""
    from benchmarks.uptraining.plots import plot_losses, plot_positions

    results = read_results(study.runs)
    text = table(results) + "\n" + position_table(results)
    write_atomically(study.output / "results.json", results_as_json(results).encode())
    write_atomically(study.output / "table.md", text.encode())
    plot_losses(results, study.output / "uptraining_loss.png")
    plot_positions(results, study.output / "uptraining_positions.png")
    print(text)
    say(f"wrote results.json, table.md and two plots to {study.output}")


def main() -> None:
    """Runs the study, or what is left of it."""
    arguments = parse_arguments()
    exit_on_termination()
    if min(arguments.seeds, arguments.jobs) < 1:
        raise ConfigurationError("--seeds and --jobs must be at least 1")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigurationError('the plots need matplotlib; install it with: pip install -e ".[evaluation]"')
    output = arguments.output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    config = load_config(CONFIGS / "block.yaml")
    prepare(arguments, output, config.model.vocab_size)
    study = Study(
        output=output,
        seeds=arguments.seeds,
        extra_seeds=arguments.seeds if arguments.extra_seeds is None else arguments.extra_seeds,
        steps=arguments.steps or config.train.steps,
        block_length=config.model.block_length,
    )
    run_all(study.runs, arguments.jobs, say)
    write_report(study)


if __name__ == "__main__":
    run(main, StudyError, ConfigurationError, DataError)
