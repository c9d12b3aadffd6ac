"""Continues a text: tools/generate.py --checkpoint RUN_OR_STEP --prompt TEXT --max-new-tokens N."""

import sys
from pathlib import Path

# Run as a script, the first entry of sys.path is this folder; the repository root must stand there instead.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import contextlib
import signal
import warnings
from collections.abc import Callable, Iterator

# Megatron-core warns at import about optional libraries that this project does not use.
warnings.filterwarnings("ignore", module=r"megatron\.core")

import torch.distributed

from checkpoints.errors import CheckpointError
from checkpoints.trained_model import find_trained_model
from data.errors import DataError
from data.tokenizer import Tokenizer
from inference.errors import InferenceError
from inference.generator import Generator
from inference.sampling import SamplingConfig, sampling_config
from inference.text import continue_text
from inference.tokenizer_choice import tokenizer_of
from parallel.errors import ConfigurationError
from parallel.topology import start_single_process
from tools.command_line import run
from tools.precision import add_precision, chosen_dtype


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Prints a prompt and what a trained model makes of it, on one device. Without a prompt, asks for "
        "one after the other on a terminal, and else takes all of the standard input as one."
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="DIR", help="run folder (newest step) or one step folder")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="text to continue")
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help="file with the text to continue")
    add("--max-new-tokens", type=int, required=True, metavar="N", help="tokens to generate; an end of text comes first")
    add("--temperature", type=float, default=0.0, metavar="T", help="0: always the most likely token (default)")
    add("--top-k", type=int, metavar="K", help="draw from so many most likely tokens")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw from the smallest set of this probability")
    add("--seed", type=int, default=0, metavar="S", help="seed of the draws (default 0)")
    add("--tokenizer", type=Path, metavar="FILE", help="tokenizer (default: that of the data or the import)")
    add_precision(parser)
    add("--stats", action="store_true", help="say how fast it was")
    return parser.parse_args()


def given_prompt(arguments: argparse.Namespace) -> str | None:
    """The text to continue; None if it is to be asked for."""
    if arguments.prompt is not None:
        return str(arguments.prompt)
    if arguments.prompt_file is not None:
        return read_prompt(f"--prompt-file {arguments.prompt_file}", arguments.prompt_file.read_bytes)
    return None if sys.stdin.isatty() else read_prompt("the standard input", sys.stdin.buffer.read)


def asked_prompts() -> Iterator[str]:
    """What a person types."""
    with contextlib.suppress(EOFError):
        while True:
            if prompt := input("prompt (Ctrl-D ends): "):
                yield prompt


def read_prompt(called: str, read: Callable[[], bytes]) -> str:
    """The text of a file.

    Args:
        called: what the user calls it.
        read: gives its bytes.

    Raises:
        InferenceError: it cannot be read, or is no text.
    """
    try:
        return read().decode("utf-8").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InferenceError(f"{called} cannot be read as UTF-8 text ({error}); give another") from None


def main() -> None:
    """Loads the model and prints text as it comes."""
    arguments = parse_arguments()
    sampling = sampling_config(
        temperature=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p, seed=arguments.seed
    )
    prompt = given_prompt(arguments)
    trained = find_trained_model(arguments.checkpoint)
    for step, reason in trained.skipped:
        print(f"warning: step {step} is skipped: {reason}", file=sys.stderr)
    tokenizer = tokenizer_of(trained.model, trained.data, arguments.tokenizer or trained.tokenizer)
    start_single_process()
    try:
        stage = trained.load(dtype=chosen_dtype(arguments.precision))
        generator = Generator(stage, tokenizer.eos_id, tokenizer.vocab_size)
        if prompt is not None:
            continue_prompt(generator, tokenizer, prompt, arguments, sampling)
        for asked in asked_prompts() if prompt is None else ():
            try:
                continue_prompt(generator, tokenizer, asked, arguments, sampling)
            except InferenceError as error:
                print(f"error: {error}", file=sys.stderr)
    finally:
        torch.distributed.destroy_process_group()


def continue_prompt(
    generator: Generator, tokenizer: Tokenizer, prompt: str, arguments: argparse.Namespace, sampling: SamplingConfig
) -> None:
    """Prints a prompt and its continuation."""
    begun = False

    def show(text: str) -> None:
        nonlocal begun
        print(text if begun else prompt + text, end="", flush=True)
        begun = True

    made = continue_text(generator, tokenizer, prompt, arguments.max_new_tokens, sampling, show)
    print("" if begun else prompt)
    if arguments.stats:
        print(made.describe(), file=sys.stderr)


if __name__ == "__main__":
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    # Whoever reads the text, such as head, may stop before its end.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    run(main, CheckpointError, ConfigurationError, DataError, InferenceError)
