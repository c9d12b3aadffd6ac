"""Measures generation of random tokens from random prompts (the paper's protocol): greedy, nothing ends early."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from evaluation.throughput.costs import Workload, decoding_costs, prompt_costs
from evaluation.throughput.memory import PeakMemory
from inference.errors import InferenceError
from inference.generator import Generator
from inference.memory import check_room_for_cache
from parallel.device_limits import DeviceLimits, synchronize


@dataclass(frozen=True)
class Measurement:
    """One workload, measured.

    Attributes:
        batch_size: sequences at a time.
        prompt_tokens: of each.
        new_tokens: of each.
        seconds: until all tokens are there; median over the repeats.
        prompt_seconds: until the first new token of each sequence; median.
        deviation: standard deviation of `seconds` over the repeats.
        peak_bytes: most memory taken beside the weights.
        cache_bytes: of it, keys and values.
        cache_bytes_per_sequence: what the formula of the paper's section 2.4 says.
        roofline: least seconds of decoding on this device / measured ones.
        prompt_roofline: the same of prompts.
        flops_per_token: of decoding, which makes all new tokens but the first.
        moved_bytes_per_token: of decoding.
    """

    batch_size: int
    prompt_tokens: int
    new_tokens: int
    seconds: float
    prompt_seconds: float
    deviation: float
    peak_bytes: int
    cache_bytes: int
    cache_bytes_per_sequence: int
    roofline: float
    prompt_roofline: float
    flops_per_token: float
    moved_bytes_per_token: float

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all sequences over the whole time, prompts included."""
        return self.batch_size * self.new_tokens / self.seconds

    @property
    def decoding_tokens_per_second(self) -> float:
        """New tokens but the first, over the time after it."""
        return self.batch_size * (self.new_tokens - 1) / (self.seconds - self.prompt_seconds)


def measure(generator: Generator, work: Workload, limits: DeviceLimits, repeats: int = 5) -> Measurement:
    """One run to warm up, then the repeats.

    Args:
        generator: the model.
        work: what to generate.
        limits: of the device, for the roofline.
        repeats: timed runs.

    Raises:
        InferenceError: it does not fit into memory.
    """
    device = next(generator.stage.parameters()).device
    _check_room(work, device)
    prompts = random_prompts(work)
    peak = PeakMemory(device)
    _timed(generator, prompts, work.new_tokens, device)
    runs = [_timed(generator, prompts, work.new_tokens, device) for _ in range(repeats)]
    first = statistics.median(first for first, _ in runs)
    seconds = statistics.median(total for _, total in runs)
    steps = decoding_costs(work)
    least = sum(limits.seconds(cost.flops, cost.moved_bytes) * count for _, cost, count in steps)
    least_prompt = sum(limits.seconds(cost.flops, cost.moved_bytes) for cost in prompt_costs(work).values())
    tokens = work.batch_size * (work.new_tokens - 1)
    return Measurement(
        batch_size=work.batch_size,
        prompt_tokens=work.prompt_tokens,
        new_tokens=work.new_tokens,
        seconds=seconds,
        prompt_seconds=first,
        deviation=statistics.pstdev(total for _, total in runs),
        peak_bytes=peak.bytes(),
        cache_bytes=generator.cache_bytes,
        cache_bytes_per_sequence=work.cache_bytes_per_sequence,
        roofline=least / (seconds - first),
        prompt_roofline=least_prompt / first,
        flops_per_token=sum(cost.flops * count for _, cost, count in steps) / tokens,
        moved_bytes_per_token=sum(cost.moved_bytes * count for _, cost, count in steps) / tokens,
    )


def _check_room(work: Workload, device: torch.device) -> None:
    """Raises InferenceError before prompts are made: of too many sequences, these alone could fill the memory."""
    needed = work.batch_size * work.cache_bytes_per_sequence
    check_room_for_cache(needed, work.batch_size, work.prompt_tokens + work.new_tokens, device)


def random_prompts(work: Workload) -> list[list[int]]:
    """Prompts of equal length, the same in every run."""
    numbers = torch.Generator().manual_seed(work.batch_size)
    shape = (work.batch_size, work.prompt_tokens)
    prompts: list[list[int]] = torch.randint(0, work.model.vocab_size, shape, generator=numbers).tolist()
    return prompts


def split_walltime(generator: Generator, work: Workload) -> dict[str, float]:
    """Seconds by component of one generation; waiting after each component makes the whole slower than `measure`.

    Args:
        generator: the model; it is of no use for other measurements afterwards.
        work: what to generate.

    Returns:
        Seconds by component, of prompts ("prompt: ...") and of decoding ("decoding: ..."); "other" is the rest.
    """
    clock = _Clock(next(generator.stage.parameters()).device)
    generator.instrument(clock.wrap)
    prompts = random_prompts(work)
    generator.generate(prompts, work.new_tokens)  # to warm up
    clock.start()
    generator.generate(prompts, work.new_tokens, on_token=lambda place, token: clock.token_came())
    return clock.split()


class _Clock:
    """Sums up the time of wrapped components."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = {}
        self._phase = "prompt"
        self._started = 0.0
        self._first = 0.0

    def start(self) -> None:
        self._seconds = {}
        self._phase = "prompt"
        self._started = self._now()

    def token_came(self) -> None:
        if self._phase == "prompt":
            self._first = self._now()
            self._phase = "decoding"

    def wrap(self, name: str, component: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            started = self._now()
            result = component(*arguments)
            key = f"{self._phase}: {name}"
            self._seconds[key] = self._seconds.get(key, 0.0) + self._now() - started
            return result

        return timed

    def split(self) -> dict[str, float]:
        """Seconds by phase and component, the rest as "other"."""
        ends = {"prompt": self._first - self._started, "decoding": self._now() - self._first}
        for phase, seconds in ends.items():
            known = sum(value for name, value in self._seconds.items() if name.startswith(f"{phase}: "))
            self._seconds[f"{phase}: other"] = seconds - known
        return dict(self._seconds)

    def _now(self) -> float:
        synchronize(self._device)
        return time.perf_counter()


def _timed(
    generator: Generator, prompts: list[list[int]], new_tokens: int, device: torch.device
) -> tuple[float, float]:
    """Seconds until the first token of all sequences, and until the last."""
    first: list[float] = []

    def came(place: int, token: int) -> None:
        if not first:
            first.append(time.perf_counter())

    synchronize(device)
    started = time.perf_counter()
    made = generator.generate(prompts, new_tokens, on_token=came)
    synchronize(device)
    ended = time.perf_counter()
    if any(len(tokens) != new_tokens for tokens in made):
        raise InferenceError(f"the model made other than the {new_tokens} tokens that were asked for")
    return first[0] - started, ended - started
