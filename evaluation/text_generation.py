"""Continues many prompts up to stop strings, in batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from data.tokenizer import Tokenizer
from inference.generator import Generator
from inference.sampling import SamplingConfig


@dataclass(frozen=True)
class Prompt:
    """A prompt and how it is continued.

    Attributes:
        token_ids: At least one.
        max_new_tokens: Most tokens of the continuation.
        stops: The continuation ends before the first of these texts.
        sampling: How tokens are chosen.
    """

    token_ids: Sequence[int]
    max_new_tokens: int
    stops: tuple[str, ...] = ()
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


class TextGenerator:
    """Continues prompts; those of about the same length together.

    Args:
        generator: The model.
        tokenizer: The one it was trained with.
        batch_tokens: Tokens of a batch, prompts, pads and new ones.
    """

    def __init__(self, generator: Generator, tokenizer: Tokenizer, batch_tokens: int) -> None:
        self._generator = generator
        self._tokenizer = tokenizer
        self._batch_tokens = batch_tokens

    def generate(
        self, prompts: Sequence[Prompt], on_progress: Callable[[int], object] = lambda finished: None
    ) -> list[str]:
        """Gives the continuation of each prompt, without its stop string and end of text.

        Args:
            prompts: Prompts.
            on_progress: Is told from time to time how many more are finished.

        Raises:
            InferenceError: A prompt is empty or holds an unknown id, or logits are not finite.
        """
        texts = [""] * len(prompts)
        for batch in self._batches(prompts):
            for place, text in zip(batch, self._continue([prompts[place] for place in batch]), strict=True):
                texts[place] = text
            on_progress(len(batch))
        return texts

    def _batches(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Places of prompts that run together: as many new tokens each, the longest first."""
        order = sorted(
            range(len(prompts)), key=lambda place: (prompts[place].max_new_tokens, -len(prompts[place].token_ids))
        )
        batches: list[list[int]] = []
        for place in order:
            first = prompts[batches[-1][0]] if batches else None
            if first is not None and first.max_new_tokens == prompts[place].max_new_tokens:
                slots = len(first.token_ids) + first.max_new_tokens
                if slots * (len(batches[-1]) + 1) <= self._batch_tokens:
                    batches[-1].append(place)
                    continue
            batches.append([place])
        return batches

    def _continue(self, prompts: Sequence[Prompt]) -> list[str]:
        new_tokens: list[list[int]] = [[] for _ in prompts]

        def stops(number: int, token: int) -> bool:
            new_tokens[number].append(token)
            prompt = prompts[number]
            if not prompt.stops:
                return False
            text = self._text(prompt, new_tokens[number])
            return any(stop in text for stop in prompt.stops)

        made = self._generator.generate(
            [prompt.token_ids for prompt in prompts],
            prompts[0].max_new_tokens,
            [prompt.sampling for prompt in prompts],
            self._tokenizer.eos_id,
            on_token=stops,
        )
        return [_before(self._text(prompt, tokens), prompt.stops) for prompt, tokens in zip(prompts, made, strict=True)]

    def _text(self, prompt: Prompt, tokens: Sequence[int]) -> str:
        """Text of new tokens, behind the last one of the prompt: a tokenizer may drop the first space of a text."""
        last = prompt.token_ids[-1]
        return self._tokenizer.decode([last, *tokens])[len(self._tokenizer.decode([last])) :]


def _before(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    return text[: min((place for place in map(text.find, stops) if place >= 0), default=len(text))]
