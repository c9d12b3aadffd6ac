"""Trains SentencePiece tokenizers that encode any text and give it back unchanged."""

import io
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from data.errors import DataError
from data.files import write_atomically
from data.preparation.documents import read_documents

# Longer lines are cut: sentencepiece skips whole sentences above a byte limit.
MAXIMUM_LINE_CHARACTERS = 4096
MINIMUM_VOCAB_SIZE = 320
# A constant: the same files and settings give the same tokenizer.
SAMPLING_SEED = 0


def train_sentencepiece(inputs: Sequence[Path], vocab_size: int, output: Path, maximum_lines: int = 200_000) -> None:
    """Trains a byte-pair encoding with byte fallback and without any normalization; deterministic.

    Id 0 is the end of text `</s>`, id 1 the never used `<unk>`; there is no begin and no pad token. Every newline is
    one token. All text survives encoding and decoding, except that U+2581, which SentencePiece uses for a space,
    comes back as a space.

    Args:
        inputs: Text files, as `data.documents.read_documents` takes them.
        vocab_size: Number of token ids, at least 320 (256 of them are bytes).
        output: The `.model` file to write; an existing one is replaced.
        maximum_lines: A uniform sample of at most so many lines is used.

    Raises:
        DataError: Bad input, output name or vocabulary size.
    """
    if output.suffix != ".model":
        raise DataError(f"tokenizer output {output} must end in .model, the ending of SentencePiece models")
    if vocab_size < MINIMUM_VOCAB_SIZE:
        raise DataError(f"vocabulary size {vocab_size} is too small; give at least {MINIMUM_VOCAB_SIZE}")
    lines = _sample((line for path in inputs for line in _lines(path)), maximum_lines)
    model = _train(lines, vocab_size)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, model)
    except OSError as error:
        raise DataError(f"tokenizer output {output} cannot be written ({error.strerror}); give another one") from error


def _train(lines: list[str], vocab_size: int) -> bytes:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            user_defined_symbols=["\n"],
            eos_id=0,
            unk_id=1,
            bos_id=-1,
            pad_id=-1,
            max_sentence_length=4 * MAXIMUM_LINE_CHARACTERS,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(
            f"no tokenizer of {vocab_size} tokens can be trained on these files ({_last_sentence(str(error))}); "
            "give more text or another vocabulary size"
        ) from None
    return model.getvalue()


def _last_sentence(message: str) -> str:
    """The library prefixes its messages with a source position and the failed condition."""
    return message.rsplit("] ", 1)[-1].strip().rstrip(".") or message.strip()


def _lines(path: Path) -> Iterator[str]:
    for document in read_documents(path):
        for line in document.split("\n"):
            for start in range(0, len(line), MAXIMUM_LINE_CHARACTERS):
                yield line[start : start + MAXIMUM_LINE_CHARACTERS]


def _sample(lines: Iterable[str], maximum: int) -> list[str]:
    """Keeps a uniform sample in the order of the input (reservoir sampling: the input need not fit in memory)."""
    generator = random.Random(SAMPLING_SEED)
    kept: list[tuple[int, str]] = []
    for index, line in enumerate(lines):
        if index < maximum:
            kept.append((index, line))
        elif (slot := generator.randrange(index + 1)) < maximum:
            kept[slot] = (index, line)
    return [line for _, line in sorted(kept)]
