"""Turns Megatron's indexed datasets into shards: tools/import_megatron.py --input PREFIX --output DIR --tokenizer F."""

import sys
from pathlib import Path

# Run as a script, the first entry of sys.path is this folder; the repository root must stand there instead.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import os

from data.errors import DataError
from data.preparation.megatron import ImportOptions, check_import, import_megatron
from tools.command_line import exit_on_termination, run


def parse_arguments() -> tuple[ImportOptions, bool]:
    """Reads the command line; says also whether only to check."""
    parser = argparse.ArgumentParser(
        description="Turns Megatron's indexed datasets (.idx and .bin, also in parts) into shards. The output "
        "directory appears when it is complete; after an interruption the same command goes on where it stopped."
    )
    add = parser.add_argument
    add("--input", nargs="+", type=Path, required=True, metavar="PREFIX", help="datasets, without .idx and .bin")
    add("--output", type=Path, required=True, metavar="DIR", help="directory to make")
    add("--tokenizer", type=Path, required=True, metavar="FILE", help="the tokenizer that made the datasets")
    add("--validation-input", nargs="+", type=Path, default=[], metavar="PREFIX", help="datasets for validation")
    add("--validation-fraction", type=float, default=0.0, metavar="F", help="or: share of documents for validation")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="processes (default: all cores)")
    add("--shard-tokens", type=int, default=2**25, metavar="N", help="tokens per shard, at least")
    add(
        "--end-of-text",
        choices=("strip", "keep"),
        default="strip",
        help="whether an end-of-text token that ends a document is left out, since training adds one (default: strip)",
    )
    add("--check", action="store_true", help="import nothing; compare the output with the datasets, token by token")
    values = parser.parse_args()
    options = ImportOptions(
        inputs=tuple(values.input),
        output=values.output,
        tokenizer=values.tokenizer,
        validation_inputs=tuple(values.validation_input),
        validation_fraction=values.validation_fraction,
        workers=values.workers,
        shard_tokens=values.shard_tokens,
        end_of_text=values.end_of_text,
    )
    return options, values.check


def main() -> None:
    """Imports or checks, and prints what was made or compared."""
    options, check = parse_arguments()
    exit_on_termination()
    print(check_import(options) if check else import_megatron(options))


if __name__ == "__main__":
    run(main, DataError)
