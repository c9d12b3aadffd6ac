"""Chooses the next token of each sequence from logits: greedy, temperature, top-k, nucleus."""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from inference.cpu_kernels.kernels import find_most_likely, kernels_for
from inference.errors import InferenceError

# Logits whose maximum is found together.
PART = 64


class SamplingConfig(BaseModel):
    """How tokens are chosen."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    temperature: float = Field(
        default=0.0,
        ge=0.0,
        allow_inf_nan=False,
        description="0: always the most likely token; above: logits are divided by it and a token is drawn.",
    )
    top_p: float = Field(
        default=1.0, gt=0.0, le=1.0, description="Draw from the smallest set of tokens that has this probability."
    )
    top_k: int | None = Field(default=None, ge=1, description="Draw from this many most likely tokens at most.")
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of the draws.")


def sampling_config(**values: Any) -> SamplingConfig:
    """Builds a SamplingConfig from what a user typed.

    Raises:
        InferenceError: naming each bad field, its value and what is allowed.
    """
    try:
        return SamplingConfig.model_validate(values)
    except ValidationError as error:
        problems = (
            f"{item['loc'][0]}={item['input']!r} is not allowed: {item['msg'].lower()}" for item in error.errors()
        )
        raise InferenceError("; ".join(problems)) from None


class RandomNumbers:
    """The random numbers of one sequence: a function of a seed and a place, whatever the neighbours draw.

    They are drawn on the CPU, alike on every device and rank.
    """

    def __init__(self, seed: int, place: int = 0) -> None:
        digest = hashlib.sha256(f"{seed}:{place}".encode()).digest()
        self._generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def draw(self) -> float:
        """The next number, uniform in [0, 1)."""
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))


class Sampler:
    """Chooses the tokens of one batch, each sequence by its own settings and random numbers.

    Args:
        configs: settings of each sequence.
        numbers: its random numbers.
        device: where the logits will be.
    """

    def __init__(
        self, configs: Sequence[SamplingConfig], numbers: Sequence[RandomNumbers], device: torch.device
    ) -> None:
        self._numbers = {row: numbers[row] for row, config in enumerate(configs) if config.temperature > 0.0}
        self._size = len(configs)
        self._device = device
        alike: dict[tuple[float, float, int | None], list[int]] = {}
        for row in self._numbers:
            config = configs[row]
            alike.setdefault((config.temperature, config.top_p, config.top_k), []).append(row)
        self._groups = [(settings, torch.tensor(rows, device=device)) for settings, rows in alike.items()]

    def choose(self, logits: Tensor) -> Tensor:
        """Chooses one token per row of logits [B, V]; returns int64 [B].

        Raises:
            InferenceError: a logit is not a number.
        """
        tokens, highest = self._select(logits, self.draw())
        check_finite(all(map(math.isfinite, highest.tolist())))
        return tokens

    def draw(self) -> Tensor:
        """The next random number of each sequence that needs one, fp64 [B], uniform in [0, 1)."""
        if not self._numbers:
            return torch.zeros(self._size, dtype=torch.float64, device=self._device)
        drawn = [self._numbers[row].draw() if row in self._numbers else 0.0 for row in range(self._size)]
        return torch.tensor(drawn, dtype=torch.float64).to(self._device)

    def select(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Chooses by given random numbers, without waiting for the device.

        Args:
            logits: [B, V].
            uniform: from `draw`.

        Returns:
            Tokens int64 [B], and whether all logits are finite (-inf alone rules a token out).
        """
        tokens, highest = self._select(logits, uniform)
        return tokens, torch.isfinite(highest).all()

    def _select(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens, and the largest logit of each row, which is not finite if any is NaN or infinite."""
        highest, tokens = most_likely(logits)
        for settings, rows in self._groups:
            tokens[rows] = _draw(*candidates(logits[rows], *settings), uniform[rows])
        return tokens, highest


def check_finite(finite: Tensor | bool) -> None:
    """Looks at what Sampler.select says of the logits.

    Raises:
        InferenceError: one is not a number.
    """
    if not bool(finite):
        raise InferenceError("the model gives logits that are not finite; its weights are damaged or diverged")


def most_likely(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of logits [B, V] and its place; of equal ones the first.

    Without the C++ kernel in two steps, because on CPU torch finds a maximum six times as fast as a maximum and its
    place.
    """
    library = kernels_for(logits)
    if library is not None:
        return find_most_likely(library, logits)
    whole = logits.shape[-1] // PART * PART
    parts = logits[:, :whole].unflatten(-1, (-1, PART)).amax(dim=-1)
    if whole < logits.shape[-1]:
        parts = torch.cat((parts, logits[:, whole:].amax(dim=-1, keepdim=True)), dim=-1)
    highest, part = parts.max(dim=-1)
    places = part[:, None] * PART + torch.arange(PART, device=logits.device)
    # Places behind the last logit repeat it, and come after it.
    inside = logits.gather(1, places.clamp_(max=logits.shape[-1] - 1)).argmax(dim=-1)
    return highest, part * PART + inside


def candidates(logits: Tensor, temperature: float, top_p: float, top_k: int | None) -> tuple[Tensor, Tensor | None]:
    """The tokens that may be drawn: of the top_k most likely ones, the smallest set with a probability of top_p.

    Of equally likely tokens, lower ids come first.

    Args:
        logits: [B, V].
        temperature: above 0.
        top_p: in (0, 1]; 1 keeps every token.
        top_k: at least 1; None keeps every token.

    Returns:
        Probabilities fp64 [B, tokens], 0 outside the set, not normalized; and their ids [B, tokens], None if these are
        0 to V - 1.
    """
    scaled = (logits.double() - logits.double().amax(dim=-1, keepdim=True)) / temperature
    probabilities = torch.softmax(scaled, dim=-1)
    if top_p == 1.0 and (top_k is None or top_k >= logits.shape[-1]):
        return probabilities, None
    ordered, ids = probabilities.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ordered, ids = ordered[:, :top_k], ids[:, :top_k]
        ordered = ordered / ordered.sum(dim=-1, keepdim=True)
    reached_before = torch.cat((torch.zeros_like(ordered[:, :1]), ordered.cumsum(dim=-1)[:, :-1]), dim=-1)
    return ordered if top_p == 1.0 else ordered.masked_fill(reached_before >= top_p, 0.0), ids


def _draw(probabilities: Tensor, ids: Tensor | None, uniform: Tensor) -> Tensor:
    """Inverse-transform sampling of one id per row, from uniform [B] in [0, 1)."""
    cumulative = probabilities.cumsum(dim=-1)
    target = uniform[:, None] * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, target, right=True)
    # Rounding may put the target on the very end; the last token that counts is then the answer.
    counts = probabilities > 0
    last = counts.shape[-1] - 1 - counts.int().flip(-1).argmax(dim=-1, keepdim=True)
    place = torch.minimum(place, last)
    return (place if ids is None else ids.gather(1, place)).squeeze(1)
