"""Chooses the next token of each sequence from logits: greedy, temperature, nucleus."""

import hashlib
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from inference.errors import InferenceError


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


class Sampler:
    """Draws the tokens of one batch.

    Each sequence has its own random numbers, a function of the seed and its place in the batch, so that its tokens do
    not depend on how many neighbours it has. They are drawn on the CPU, alike on every device and rank.
    """

    def __init__(self, config: SamplingConfig, num_sequences: int) -> None:
        self.config = config
        self._generators = [_generator(config.seed, row) for row in range(num_sequences)]

    def choose(self, logits: Tensor) -> Tensor:
        """Chooses one token per row of logits [B, V]; returns int64 [B].

        Raises:
            InferenceError: a logit is not a number.
        """
        if not bool(torch.isfinite(logits).all()):
            raise InferenceError("the model gives logits that are not finite; its weights are damaged or diverged")
        if self.config.temperature == 0.0:
            return logits.argmax(dim=-1)
        probabilities, ids = nucleus(logits, self.config.temperature, self.config.top_p)
        uniform = torch.stack([torch.rand((), generator=one, dtype=torch.float64) for one in self._generators])
        return _draw(probabilities, ids, uniform.to(logits.device))


def nucleus(logits: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """The smallest set of most likely tokens whose probability is at least top_p; of equal ones, lower ids first.

    Args:
        logits: [B, V].
        temperature: above 0.
        top_p: in (0, 1]; 1 keeps every token.

    Returns:
        Probabilities fp64 [B, V] in descending order, 0 outside the set, not normalized; and their ids [B, V].
    """
    scaled = logits.double() - logits.double().amax(dim=-1, keepdim=True)
    ordered, ids = torch.softmax(scaled / temperature, dim=-1).sort(dim=-1, descending=True, stable=True)
    if top_p == 1.0:
        return ordered, ids
    reached_before = torch.cat((torch.zeros_like(ordered[:, :1]), ordered.cumsum(dim=-1)[:, :-1]), dim=-1)
    return ordered.masked_fill(reached_before >= top_p, 0.0), ids


def _draw(probabilities: Tensor, ids: Tensor, uniform: Tensor) -> Tensor:
    """Inverse-transform sampling of one id per row, from uniform [B] in [0, 1)."""
    cumulative = probabilities.cumsum(dim=-1)
    target = uniform[:, None] * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, target, right=True)
    # Rounding may put the target on the very end; the last token that counts is then the answer.
    last = (probabilities > 0).sum(dim=-1, keepdim=True) - 1
    return ids.gather(1, torch.minimum(place, last)).squeeze(1)


def _generator(seed: int, row: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{row}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
