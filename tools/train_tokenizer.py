"""Trains a SentencePiece tokenizer: tools/train_tokenizer.py --input FILES --vocab-size V --output FILE."""

import sys
from pathlib import Path

# Run as a script, the first entry of sys.path is this folder; the repository root must stand there instead.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse

from data.errors import DataError
from data.preparation.tokenizer_training import train_sentencepiece
from data.tokenizer import load_tokenizer
from tools.command_line import run


def main() -> None:
    """Trains the tokenizer and prints its fingerprint."""
    parser = argparse.ArgumentParser(description="Trains a SentencePiece tokenizer that encodes any text losslessly.")
    add = parser.add_argument
    add("--input", nargs="+", type=Path, required=True, metavar="FILE", help="text files, plain or compressed")
    add("--vocab-size", type=int, required=True, metavar="V", help="number of tokens, at least 320")
    add("--output", type=Path, required=True, metavar="FILE", help="the .model file to write")
    arguments = parser.parse_args()
    train_sentencepiece(arguments.input, arguments.vocab_size, arguments.output)
    tokenizer = load_tokenizer(arguments.output)
    print(f"trained: {arguments.output}, {tokenizer.vocab_size:,} tokens, fingerprint {tokenizer.fingerprint}")


if __name__ == "__main__":
    run(main, DataError)
