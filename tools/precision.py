"""The type of weights that a tool runs a model with."""

import argparse

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def add_precision(parser: argparse.ArgumentParser) -> None:
    """Adds --precision."""
    parser.add_argument(
        "--precision", choices=DTYPES, help="of weights, keys and values (default: bf16 on a GPU, fp32 on CPU)"
    )


def chosen_dtype(precision: str | None) -> torch.dtype:
    """The type that was asked for, or the device's default."""
    if precision is None:
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return DTYPES[precision]
