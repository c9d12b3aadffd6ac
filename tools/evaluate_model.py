"""Evaluates a trained model on its validation split: tools/evaluate_model.py --checkpoint RUN_OR_STEP."""

import sys
from pathlib import Path

# Run as a script, the first entry of sys.path is this folder; the repository root must stand there instead.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import warnings
from dataclasses import asdict

# Megatron-core warns at import about optional libraries that this project does not use.
warnings.filterwarnings("ignore", module=r"megatron\.core")

import torch.distributed

from checkpoints.errors import CheckpointError
from checkpoints.trained_model import find_trained_model
from data.errors import DataError
from data.streaming.stream import SequenceStream
from evaluation.language_modeling import evaluate_language_modeling
from parallel.errors import ConfigurationError
from parallel.topology import start_single_process
from tools.command_line import run


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Prints the loss on held-out text beside the unigram entropy of the same tokens, and what it "
        "becomes when sequences are given each other's context embeddings."
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="DIR", help="run folder (newest step) or one step folder")
    add("--sequences", type=int, default=256, metavar="N", help="validation sequences, at most (default 256)")
    add("--batch-size", type=int, default=16, metavar="N", help="sequences per forward pass, at least 2 (default 16)")
    add(
        "--skip-tokens",
        type=int,
        default=0,
        metavar="N",
        help="leave out the first N tokens of each sequence as targets; a vanilla model then predicts the same tokens "
        "as a Block Transformer with blocks of N (default 0)",
    )
    add("--json", type=Path, metavar="FILE", help="also write the results there")
    return parser.parse_args()


def main() -> None:
    """Loads the model and prints the results."""
    arguments = parse_arguments()
    trained = find_trained_model(arguments.checkpoint.absolute())
    for step, reason in trained.skipped:
        print(f"warning: step {step} is skipped: {reason}", file=sys.stderr)
    if trained.data is None:
        raise ConfigurationError(
            f"--checkpoint {arguments.checkpoint} was imported, so it has no validation split of its own; evaluate a "
            "run of tools/pretrain.py"
        )
    stream = SequenceStream(
        trained.data,
        "validation",
        block_length=trained.model.unit_length,
        sequence_length=trained.model.sequence_length,
    )
    start_single_process()
    try:
        result = evaluate_language_modeling(
            trained.load(), stream, arguments.sequences, arguments.batch_size, arguments.skip_tokens
        )
    finally:
        torch.distributed.destroy_process_group()
    print(f"step {trained.step} of {trained.folder.name}")
    print("\n".join(result.lines()))
    if arguments.json is not None:
        _write(arguments.json, json.dumps({"step": trained.step, **asdict(result)}, indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"--json {path} cannot be written: {error.strerror}; name another file") from None


if __name__ == "__main__":
    run(main, CheckpointError, ConfigurationError, DataError)
