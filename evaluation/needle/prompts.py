"""Prompts with a needle at a given depth: each a function of seed, length, depth and number of the sample."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from data.tokenizer import Tokenizer
from evaluation.needle.haystack import Haystack
from evaluation.needle.wording import CITIES, NEEDLE, NUMBER_DIGITS, PROMPT_KINDS
from parallel.errors import ConfigurationError

# Fewer tokens than this are no haystack; they also make up for numbers that take some tokens more than others.
SMALLEST_HAYSTACK = 32


@dataclass(frozen=True)
class Sample:
    """A prompt and what must come of it.

    Attributes:
        prompt: token ids.
        number: the needle's, as text.
        needle_start: place of the needle's first token in the prompt.
    """

    prompt: list[int]
    number: str
    needle_start: int


@dataclass(frozen=True)
class PromptBuilder:
    """Makes the samples of one model.

    Attributes:
        tokenizer: the model's.
        unit: its block length, 1 for vanilla models: prompts are whole blocks, so none needs padding.
        new_tokens: tokens that will be generated; prompt and answer together fill the context.
        seed: of all random choices.
    """

    tokenizer: Tokenizer
    unit: int
    new_tokens: int
    seed: int

    def prompt_length(self, length: int) -> int:
        """Tokens of a prompt in a context of that length."""
        return (length - self.new_tokens) // self.unit * self.unit

    def check_lengths(self, lengths: Sequence[int], kinds: Sequence[str], option: str) -> None:
        """Checks that needle, question and answer leave room for text.

        Raises:
            ConfigurationError: they do not.
        """
        frame = max(sum(map(len, self._parts(kind, city, "8" * NUMBER_DIGITS))) for kind in kinds for city in CITIES)
        smallest = frame + SMALLEST_HAYSTACK + self.new_tokens + self.unit
        for length in lengths:
            if length < smallest:
                raise ConfigurationError(
                    f"{option} {length} is too short: needle and question take up to {frame} tokens and the answer "
                    f"{self.new_tokens}; use {smallest} or more"
                )

    def sample(self, haystack: Haystack, kind: str, length: int, depth: float, index: int) -> Sample:
        """Makes one sample; all kinds hide the same needle in the same text.

        Args:
            haystack: the text.
            kind: one of PROMPT_KINDS.
            length: tokens of prompt and answer together, but for the rest of a block.
            depth: where the needle stands, in per cent of the text before it.
            index: number of the sample.
        """
        draw = random.Random(f"{self.seed} {length} {depth:g} {index}")
        city, number = draw.choice(CITIES), str(draw.randrange(10 ** (NUMBER_DIGITS - 1), 10**NUMBER_DIGITS))
        before, needle, after = self._parts(kind, city, number)
        room = self.prompt_length(length) - len(before) - len(needle) - len(after)
        text = haystack.window(draw.randrange(len(haystack.token_ids)), room)
        place = round(room * depth / 100)
        return Sample(
            [*before, *text[:place], *needle, *text[place:], *after], number, needle_start=len(before) + place
        )

    def _parts(self, kind: str, city: str, number: str) -> tuple[list[int], list[int], list[int]]:
        """Tokens of what stands before the text, of the needle, and of what stands after the text."""
        frame = PROMPT_KINDS[kind]
        texts = (frame.before, NEEDLE.format(city=city, number=number), frame.after.format(city=city))
        before, needle, after = self.tokenizer.encode_batch(texts)
        return before, needle, after
