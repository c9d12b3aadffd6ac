"""Looks into prepared data: tools/inspect_data.py {statistics,documents,step,verify,compare} ..."""

import sys
from pathlib import Path

# Run as a script, the first entry of sys.path is this folder; the repository root must stand there instead.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse

from checkpoints.errors import CheckpointError
from data.errors import DataError
from data.inspection.comparison import compare_corpora
from data.inspection.corpus import SPLITS
from data.inspection.show import describe_documents
from data.inspection.statistics import describe_corpus
from data.inspection.verification import verify_corpus
from data.tokenizer import load_tokenizer
from parallel.errors import ConfigurationError
from tools.command_line import run
from train.step_contents import describe_step


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Looks into prepared data, and into what a run reads of it.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")

    statistics = command("statistics", "sizes, document lengths, and how much packing pads and drops")
    statistics.add_argument("--block-length", type=int, default=4, help="tokens per block (default 4)")
    statistics.add_argument("--sequence-length", type=int, default=2048, help="tokens per sequence (default 2048)")
    documents = command("documents", "documents of a shard as text")
    documents.add_argument("--split", choices=SPLITS, default="train")
    documents.add_argument("--shard", type=int, default=0, help="number of the shard (default 0)")
    documents.add_argument("--first", type=int, default=0, help="first document (default 0)")
    documents.add_argument("--count", type=int, default=3, help="how many (default 3)")
    documents.add_argument("--characters", type=int, default=300, help="of each document; 0 for all (default 300)")
    verify = command("verify", "read every byte and compare it with the manifests; status 1 if any file is damaged")
    compare = command("compare", "what two directories have in common; status 1 if they differ")
    for each in (statistics, documents, verify, compare):
        each.add_argument("directory", type=Path, metavar="DIR", help="made by tools/prepare_data.py")
    compare.add_argument("other", type=Path, metavar="DIR", help="another one")
    step = command("step", "the sequences and documents that a step of a run has read or will read")
    step.add_argument("run", type=Path, metavar="RUN", help="folder of a run, or a configuration file")
    step.add_argument("overrides", nargs="*", metavar="FIELD=VALUE", help="changes to a configuration file")
    step.add_argument("--step", type=int, required=True, help="number of the optimizer step, from 1")
    step.add_argument("--rank", type=int, help="only this process (default: all data-parallel ranks)")
    step.add_argument("--tokenizer", type=Path, metavar="FILE", help="show the text too, decoded with this tokenizer")
    # Behind an option, argparse leaves overrides over.
    arguments, rest = parser.parse_known_args()
    unknown = [word for word in rest if word.startswith("-") or "=" not in word]
    if unknown or (rest and arguments.command != "step"):
        parser.error(f"unrecognized arguments: {' '.join(unknown or rest)}")
    if rest:
        arguments.overrides += rest
    return arguments


def main() -> int:
    """Carries out one command; returns the exit status."""
    arguments = parse_arguments()
    shows_progress = sys.stderr.isatty()
    if arguments.command == "statistics":
        print(describe_corpus(arguments.directory, arguments.block_length, arguments.sequence_length))
    elif arguments.command == "documents":
        chosen = (arguments.split, arguments.shard, arguments.first, arguments.count, arguments.characters)
        print(describe_documents(arguments.directory, *chosen))
    elif arguments.command == "step":
        tokenizer = load_tokenizer(arguments.tokenizer) if arguments.tokenizer else None
        print(describe_step(arguments.run, arguments.overrides, arguments.step, arguments.rank, tokenizer))
    elif arguments.command == "compare":
        text, same = compare_corpora(arguments.directory, arguments.other, shows_progress)
        print(text)
        return 0 if same else 1
    else:
        found = verify_corpus(arguments.directory, shows_progress)
        print("\n".join([*found.problems, f"{found.shards} shards read, {len(found.problems)} damaged"]))
        return 1 if found.problems else 0
    return 0


if __name__ == "__main__":
    run(main, DataError, ConfigurationError, CheckpointError)
