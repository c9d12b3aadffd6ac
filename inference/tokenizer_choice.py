"""Finds the tokenizer that a model was trained with."""

import contextlib
from pathlib import Path

from data.config import DataConfig
from data.errors import DataError
from data.files import sha256_of_file
from data.streaming.corpus_tokenizer import tokenizer_file
from data.tokenizer import Tokenizer, load_tokenizer
from inference.errors import InferenceError
from parallel.config import ModelConfig


def tokenizer_of(model: ModelConfig, data: DataConfig | None, path: Path | None = None) -> Tokenizer:
    """Loads the tokenizer of a trained model.

    Args:
        model: Settings of the model.
        data: What it was trained on; None if that is not known.
        path: Tokenizer file to use instead of the one recorded there.

    Raises:
        InferenceError: There is no path, and the training data is gone or unknown; or the tokenizer has more tokens
            than the model, or is not the one the training data was made with.
        DataError: The tokenizer at `path` cannot be read.
    """
    if path is not None:
        tokenizer = load_tokenizer(path)
    elif data is not None:
        tokenizer = _recorded_tokenizer(data)
    else:
        raise InferenceError(
            "the model was imported without a tokenizer; give it with --tokenizer FILE, or import it again with one"
        )
    if tokenizer.vocab_size > model.vocab_size:
        raise InferenceError(
            f"tokenizer {tokenizer.path} has {tokenizer.vocab_size} tokens, the model knows {model.vocab_size}; "
            "give the tokenizer the model was trained with (--tokenizer FILE)"
        )
    if path is not None and data is not None:
        _check_same(tokenizer, data)
    return tokenizer


def _check_same(tokenizer: Tokenizer, data: DataConfig) -> None:
    """Raises InferenceError if the training data are there and were made with another tokenizer."""
    with contextlib.suppress(DataError):
        if sha256_of_file(recorded := tokenizer_file(data)) != tokenizer.fingerprint:
            raise InferenceError(
                f"--tokenizer {tokenizer.path} is not the tokenizer that the model was trained with, which is "
                f"{recorded}; leave --tokenizer out"
            )


def _recorded_tokenizer(data: DataConfig) -> Tokenizer:
    try:
        return load_tokenizer(tokenizer_file(data))
    except DataError as error:
        raise InferenceError(
            f"the tokenizer of the data that the model was trained on cannot be had: {error}; or give it with "
            "--tokenizer FILE"
        ) from None
