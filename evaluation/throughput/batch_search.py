"""Finds the largest batch that fits, measuring on the way (the paper's protocol)."""

from collections.abc import Callable
from dataclasses import dataclass

# Batch sizes from the first number on are rounded to multiples of the second.
MULTIPLES = ((2048, 256), (512, 64), (128, 16), (32, 4), (0, 1))
RESERVE = 2 * 2**30  # bytes that stay free


@dataclass(frozen=True)
class Trial:
    """One batch size that was tried.

    Attributes:
        batch_size: sequences.
        peak_bytes: memory taken; None if it did not fit.
    """

    batch_size: int
    peak_bytes: int | None


def search_batch_sizes(attempt: Callable[[int], int | None], free_bytes: int, largest: int) -> list[Trial]:
    """Tries 1, 2, and then the middle between the largest that fits and the smallest that does not or will not.

    What will not fit is predicted from the memory per sequence so far; the search ends when less than the reserve is
    free or no new size is left.

    Args:
        attempt: measures a batch size; returns its peak memory in bytes, or None if it does not fit.
        free_bytes: memory there is.
        largest: batch size that is never exceeded.

    Returns:
        All trials, in their order.
    """
    trials: list[Trial] = []
    following: int | None = 1
    while following is not None:
        trials.append(Trial(following, attempt(following)))
        following = _next_size(trials, free_bytes, largest)
    return trials


def bytes_per_sequence(trials: list[Trial]) -> float:
    """Slope of the peak memory between the smallest and the largest batch that fit."""
    fitting = sorted((trial.batch_size, trial.peak_bytes) for trial in trials if trial.peak_bytes is not None)
    (low, low_bytes), (high, high_bytes) = fitting[0], fitting[-1]
    return float(high_bytes) if low == high else (high_bytes - low_bytes) / (high - low)


def _next_size(trials: list[Trial], free_bytes: int, largest: int) -> int | None:
    fitting = [trial for trial in trials if trial.peak_bytes is not None]
    if not fitting:
        return None
    best = max(fitting, key=lambda trial: trial.batch_size)
    assert best.peak_bytes is not None
    if len(trials) == 1:
        return 2 if largest > 1 else None
    if free_bytes - best.peak_bytes < RESERVE:
        return None
    ceiling = min((trial.batch_size for trial in trials if trial.peak_bytes is None), default=largest + 1)
    slope = max(bytes_per_sequence(trials), 1.0)
    ceiling = min(ceiling, best.batch_size + max(1, int((free_bytes - best.peak_bytes) / slope)) + 1)
    size = _rounded((best.batch_size + ceiling) // 2)
    tried = {trial.batch_size for trial in trials}
    return size if size > best.batch_size and size not in tried and size <= largest else None


def _rounded(size: int) -> int:
    multiple = next(multiple for first, multiple in MULTIPLES if size >= first)
    return size // multiple * multiple
