"""The text that needles are hidden in."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.errors import DataError
from data.preparation.documents import read_documents
from data.preparation.inputs import expand_inputs
from data.tokenizer import Tokenizer
from evaluation.needle.wording import NUMBER_DIGITS

# Enough for hundreds of different windows of the longest context; what comes behind is not read.
MAXIMUM_TOKENS = 2**22
_NUMBER = re.compile(rf"(?<!\d)\d{{{NUMBER_DIGITS}}}(?!\d)")


@dataclass(frozen=True)
class Haystack:
    """Text as one ring of tokens.

    Attributes:
        token_ids: all documents, in the order of their files.
        numbers: numbers in it that look like a needle's.
    """

    token_ids: Sequence[int]
    numbers: int

    def window(self, start: int, count: int) -> list[int]:
        """So many tokens from a place on; behind the last one comes the first."""
        size = len(self.token_ids)
        start %= size
        rounds = -(-(start + count) // size)
        return list(self.token_ids if rounds == 1 else [*self.token_ids] * rounds)[start : start + count]


def read_haystack(path: Path, option: str, tokenizer: Tokenizer, longest: int) -> Haystack:
    """Reads a haystack, and warns if it must be repeated.

    Args:
        path: A file, a glob pattern or a folder, of the kinds that tools/prepare_data.py takes.
        option: Its option on the command line, for messages.
        tokenizer: The model's.
        longest: Tokens of the longest context.

    Raises:
        DataError: nothing is found, or a file cannot be read or holds no text.
    """
    token_ids: list[int] = []
    numbers = 0
    for file in expand_inputs([path], option).files:
        for text in read_documents(file):
            if not (words := text.strip()):
                continue
            token_ids += tokenizer.encode(words + "\n\n")
            numbers += len(_NUMBER.findall(text))
            if len(token_ids) >= MAXIMUM_TOKENS:
                return Haystack(token_ids, numbers)
    if not token_ids:
        raise DataError(f"{option} {path} holds no text; give files with some")
    if len(token_ids) < longest:
        print(
            f"warning: {option} {path} has {len(token_ids):,} tokens and is repeated to fill a context of {longest:,}; "
            "a model that has noticed predicts it without a needle's help",
            file=sys.stderr,
        )
    return Haystack(token_ids, numbers)
