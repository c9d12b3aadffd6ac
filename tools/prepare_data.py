"""Turns text files into shards: tools/prepare_data.py --input FILES --output DIR --tokenizer FILE."""

import sys
from pathlib import Path

# Run as a script, the first entry of sys.path is this folder; the repository root must stand there instead.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import os

from data.errors import DataError
from data.preparation.documents import TEXT_FIELD
from data.preparation.prepare import DEFAULT_SHARD_TOKENS, PreparationOptions, prepare
from tools.command_line import exit_on_termination, run


def parse_arguments() -> PreparationOptions:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Tokenizes .txt, .jsonl and .parquet files (also .xz, .gz, .zst) into shards. The output directory "
        "appears when complete; after an interruption the same command goes on where it stopped. See docs/data.md."
    )
    add = parser.add_argument
    add("--input", nargs="+", type=Path, required=True, metavar="PATH", help="training: files, globs or directories")
    add("--output", type=Path, required=True, metavar="DIR", help="directory to make")
    add("--tokenizer", type=Path, required=True, metavar="FILE", help="SentencePiece .model or tokenizer.json")
    add("--validation-input", nargs="+", type=Path, default=[], metavar="PATH", help="the same for validation")
    add("--validation-fraction", type=float, default=0.0, metavar="F", help="or: share of documents for validation")
    add("--text-field", default=TEXT_FIELD, metavar="NAME", help="JSON field or parquet column (default: %(default)s)")
    add("--on-malformed", choices=("fail", "skip"), default="fail", help="malformed input: stop (default), or list it")
    add("--min-tokens", type=int, default=0, metavar="N", help="leave out shorter documents")
    add("--remove-duplicates", action="store_true", help="keep one of documents with equal text")
    add("--shuffle-documents", type=int, metavar="SEED", help="put all documents in random order")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="processes (default: all cores)")
    add("--shard-tokens", type=int, default=DEFAULT_SHARD_TOKENS, metavar="N", help="tokens per shard, at least")
    values = vars(parser.parse_args())
    inputs, validation_inputs = values.pop("input"), values.pop("validation_input")
    return PreparationOptions(inputs=tuple(inputs), validation_inputs=tuple(validation_inputs), **values)


def main() -> None:
    """Prepares the data and prints what was made."""
    options = parse_arguments()
    exit_on_termination()
    print(prepare(options))


if __name__ == "__main__":
    run(main, DataError)
