"""What belongs to one sequence, apart from its slot in a batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from inference.errors import InferenceError
from inference.sampling import RandomNumbers, SamplingConfig


@dataclass
class RunningSequence:
    """A prompt and its continuation.

    Attributes:
        prompt: token ids.
        max_new_tokens: the sequence ends with so many new tokens.
        sampling: how they are chosen.
        numbers: random numbers of its own.
        eos_id: or the sequence ends with this token.
        on_token: called with each token as soon as it is known; the sequence ends if it answers True.
        tokens: new tokens so far.
        ended: whether there will be no more.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: SamplingConfig
    numbers: RandomNumbers
    eos_id: int | None = None
    on_token: Callable[[int], object] | None = None
    tokens: list[int] = field(default_factory=list)
    ended: bool = False

    def add(self, token: int) -> None:
        """Takes the next token, unless the sequence has ended."""
        if self.ended:
            return
        self.tokens.append(token)
        self.ended = token == self.eos_id or len(self.tokens) == self.max_new_tokens
        if self.on_token is not None and self.on_token(token) is True:
            self.ended = True


def start_sequences(
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: SamplingConfig | Sequence[SamplingConfig],
    eos_id: int | None,
    on_token: Callable[[int, int], object] | None,
) -> list[RunningSequence]:
    """Makes the sequences of a batch; see Generator.generate.

    Raises:
        InferenceError: there is not one sampling configuration for each prompt.
    """
    alone = isinstance(sampling, SamplingConfig)
    configs = [sampling] * len(prompts) if isinstance(sampling, SamplingConfig) else list(sampling)
    if len(configs) != len(prompts):
        raise InferenceError(
            f"{len(configs)} sampling configurations were given for {len(prompts)} prompts; give one each"
        )
    sequences = []
    for place, (prompt, config) in enumerate(zip(prompts, configs, strict=True)):
        numbers = RandomNumbers(config.seed, place if alone else 0)
        tell = None if on_token is None else (lambda token, place=place: on_token(place, token))
        sequences.append(RunningSequence(prompt, max_new_tokens, config, numbers, eos_id, tell))
    return sequences
