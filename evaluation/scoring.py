"""How probable texts are: what scores them, and what it says."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class ScoredText:
    """A text of which the last part is scored; token ids."""

    context: Sequence[int]
    continuation: Sequence[int]


@dataclass(frozen=True)
class Score:
    """How probable the continuation is behind the context.

    Attributes:
        log_probability: Sum over its scored tokens, in nats.
        is_greedy: Whether each of these is the model's most likely token; False if there is none.
        scored_tokens: How many these are. Fewer than the continuation has, where the model cannot predict its first
            ones: the first token of a text, the first block without left padding, and what does not fit.
    """

    log_probability: float
    is_greedy: bool
    scored_tokens: int


class Scorer(Protocol):
    """A model that scores texts, wherever it lies."""

    @property
    def max_length(self) -> int:
        """One less than the tokens of the longest text: of a longer one the last max_length + 1 tokens are kept."""

    def score(
        self, requests: Sequence[ScoredText], on_progress: Callable[[int], object] = lambda finished: None
    ) -> list[Score]:
        """Scores texts.

        Args:
            requests: Texts of any lengths, in any order.
            on_progress: Is told from time to time how many more texts are finished.

        Returns:
            A score for each.
        """
