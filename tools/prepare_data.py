"""Turns text files into shards: tools/prepare_data.py --input FILES --output DIR --tokenizer FILE."""

import sys
from pathlib import Path

# Run as a script, the first entry of sys.path is this folder; the repository root must stand there instead.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import os

from data.errors import DataError
from data.preparation.prepare import DEFAULT_SHARD_TOKENS, PreparationOptions, prepare
from tools.command_line import exit_on_termination, run


def parse_arguments() -> PreparationOptions:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Tokenizes .txt and .jsonl files (also .xz, .gz, .zst) into shards. The output directory appears "
        "when it is complete; after an interruption the same command goes on where it stopped."
    )
    add = parser.add_argument
    add("--input", nargs="+", type=Path, required=True, metavar="FILE", help="text files for training")
    add("--output", type=Path, required=True, metavar="DIR", help="directory to make")
    add("--tokenizer", type=Path, required=True, metavar="FILE", help="SentencePiece .model or tokenizer.json")
    add("--validation-input", nargs="+", type=Path, default=[], metavar="FILE", help="text files for validation")
    add("--validation-fraction", type=float, default=0.0, metavar="F", help="or: share of documents for validation")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="processes (default: all cores)")
    add("--shard-tokens", type=int, default=DEFAULT_SHARD_TOKENS, metavar="N", help="tokens per shard, at least")
    values = parser.parse_args()
    return PreparationOptions(
        inputs=tuple(values.input),
        output=values.output.absolute(),
        tokenizer=values.tokenizer,
        validation_inputs=tuple(values.validation_input),
        validation_fraction=values.validation_fraction,
        workers=values.workers,
        shard_tokens=values.shard_tokens,
    )


def main() -> None:
    """Prepares the data and prints what was made."""
    options = parse_arguments()
    exit_on_termination()
    print(prepare(options))


if __name__ == "__main__":
    run(main, DataError)
