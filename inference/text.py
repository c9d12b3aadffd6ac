"""Generates text from text."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data.tokenizer import Tokenizer
from inference.errors import InferenceError
from inference.generator import Generator
from inference.sampling import SamplingConfig

# What a tokenizer shows for bytes that are not yet a whole character.
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class TextGeneration:
    """A prompt, what the model made of it, and how fast.

    Attributes:
        prompt: the text that was given.
        continuation: what comes behind it.
        prompt_tokens: tokens of the prompt.
        new_tokens: tokens of the continuation, an end of text included.
        first_seconds: until the first token.
        seconds: until the last one.
    """

    prompt: str
    continuation: str
    prompt_tokens: int
    new_tokens: int
    first_seconds: float
    seconds: float

    @property
    def text(self) -> str:
        """Prompt and continuation."""
        return self.prompt + self.continuation

    def describe(self) -> str:
        """Sums up the speed in one line."""
        following = self.new_tokens - 1
        speed = f", then {following / (self.seconds - self.first_seconds):,.1f} tokens/s" if following else ""
        return (
            f"{self.prompt_tokens:,} prompt tokens, first new token after {self.first_seconds:.3f} s{speed}; "
            f"{self.new_tokens:,} tokens in {self.seconds:.3f} s"
        )


class _GrowingText:
    """The text of tokens that come one by one, and the moments of the first and the last.

    Only the newest tokens are decoded again, together with some before them whose text is known: a tokenizer may drop
    the space before the first token, and a character may take several tokens.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], on_text: Callable[[str], object]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids)
        self._known_from, self._known_to = 0, len(self._ids)
        self._pieces: list[str] = []
        self._on_text = on_text
        self._started = time.perf_counter()
        self.moments: list[float] = []

    def add(self, token: int) -> None:
        self.moments.append(time.perf_counter() - self._started)
        self._ids.append(token)
        self._show(is_last=False)

    def finish(self) -> str:
        """Shows the rest, even if it ends within a character; returns all that came behind the prompt."""
        self._show(is_last=True)
        return "".join(self._pieces)

    def _show(self, is_last: bool) -> None:
        known = self._tokenizer.decode(self._ids[self._known_from : self._known_to])
        text = self._tokenizer.decode(self._ids[self._known_from :])
        if len(text) <= len(known) or (text.endswith(INCOMPLETE) and not is_last):
            return
        self._pieces.append(text[len(known) :])
        self._on_text(self._pieces[-1])
        self._known_from, self._known_to = self._known_to, len(self._ids)


def _encode(generator: Generator, tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Token ids of a prompt; raises InferenceError, see continue_text."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        # What Python makes of bytes of the command line that are no UTF-8.
        raise InferenceError(f"the prompt is not UTF-8 text at character {error.start}; give another") from None
    prompt_ids = tokenizer.encode(prompt)
    if not prompt_ids:
        raise InferenceError(f"prompt {prompt!r} gives no token, and the model needs something to continue; add text")
    longest = generator.stage.model_config.sequence_length
    if len(prompt_ids) > longest:
        raise InferenceError(
            f"the prompt has {len(prompt_ids)} tokens, and the model was trained on model.sequence_length={longest}; "
            "give a shorter one"
        )
    return prompt_ids


def continue_text(
    generator: Generator,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    sampling: SamplingConfig,
    on_text: Callable[[str], object] = lambda text: None,
) -> TextGeneration:
    """Continues a text up to the model's end of text.

    Args:
        generator: the model.
        tokenizer: the one it was trained with.
        prompt: text to continue.
        max_new_tokens: most tokens to add.
        sampling: how tokens are chosen.
        on_text: called with each new piece of the continuation as soon as it is known.

    Returns:
        The prompt and its continuation.

    Raises:
        InferenceError: the prompt is no text, gives no token or more than the model reads; or max_new_tokens is
            negative.
    """
    prompt_ids = _encode(generator, tokenizer, prompt)
    growing = _GrowingText(tokenizer, prompt_ids, on_text)
    generator.generate(
        [prompt_ids], max_new_tokens, sampling, tokenizer.eos_id, on_token=lambda _, token: growing.add(token)
    )
    moments = growing.moments or [0.0]
    return TextGeneration(prompt, growing.finish(), len(prompt_ids), len(growing.moments), moments[0], moments[-1])
