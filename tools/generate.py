"""Continues a text: tools/generate.py --checkpoint RUN_OR_STEP --prompt TEXT --max-new-tokens N."""

import sys
from pathlib import Path

# Run as a script, the first entry of sys.path is this folder; the repository root must stand there instead.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import warnings

# Megatron-core warns at import about optional libraries that this project does not use.
warnings.filterwarnings("ignore", module=r"megatron\.core")

import torch.distributed

from checkpoints.errors import CheckpointError
from checkpoints.trained_model import find_trained_model
from data.errors import DataError
from inference.errors import InferenceError
from inference.generator import Generator
from inference.sampling import sampling_config
from inference.text import continue_text
from inference.tokenizer_choice import tokenizer_of
from parallel.errors import ConfigurationError
from parallel.topology import start_single_process
from tools.command_line import run


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Prints a prompt and what a trained model makes of it, on one device.")
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="DIR", help="run folder (newest step) or one step folder")
    add("--prompt", required=True, metavar="TEXT", help="text to continue")
    add("--max-new-tokens", type=int, required=True, metavar="N", help="tokens to generate; an end of text comes first")
    add("--temperature", type=float, default=0.0, metavar="T", help="0: always the most likely token (default)")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw from the smallest set of this probability")
    add("--seed", type=int, default=0, metavar="S", help="seed of the draws (default 0)")
    add("--tokenizer", type=Path, metavar="FILE", help="tokenizer (default: that of the data or the import)")
    return parser.parse_args()


def main() -> None:
    """Loads the model and prints the text."""
    arguments = parse_arguments()
    sampling = sampling_config(temperature=arguments.temperature, top_p=arguments.top_p, seed=arguments.seed)
    trained = find_trained_model(arguments.checkpoint)
    for step, reason in trained.skipped:
        print(f"warning: step {step} is skipped: {reason}", file=sys.stderr)
    tokenizer = tokenizer_of(trained.model, trained.data, arguments.tokenizer or trained.tokenizer)
    start_single_process()
    try:
        generator = Generator(trained.load(), tokenizer.eos_id, tokenizer.vocab_size)
        print(continue_text(generator, tokenizer, arguments.prompt, arguments.max_new_tokens, sampling))
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    run(main, CheckpointError, ConfigurationError, DataError, InferenceError)
