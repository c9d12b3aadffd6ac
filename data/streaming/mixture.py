"""Which source gives the sequence at a position: exact shares over any stretch, in constant time, without state.

Within a stage a pattern of sources repeats. It is built by earliest deadline first: the j-th sequence of a source with
share w is due in slots [floor((j - 1) / w), ceil(j / w)), which keeps every source less than one sequence away from its
exact share at any time (proportionate fairness: Baruah, Cohen, Plaxton, Varvel, Algorithmica 1996).
"""

import heapq
import math
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Raise it whenever the order of sources changes: it is part of what a checkpoint records.
MIXTURE_VERSION = 1
# Longest pattern; shares are exact multiples of one over the pattern's length.
MAXIMUM_PERIOD = 2**16


class SourcePosition(NamedTuple):
    """A position of the mixture, seen from its source.

    Attributes:
        source: Index of the source.
        position: Position in the source's own endless stream.
    """

    source: int
    position: int


class MixtureStage(NamedTuple):
    """Constant shares from a position on.

    Attributes:
        begin: First position.
        shares: Sequences of each source in one pattern.
    """

    begin: int
    shares: tuple[int, ...]


class _Pattern(NamedTuple):
    sources: NDArray[np.int64]  # [period] source of each slot
    before: NDArray[np.int64]  # [period] earlier slots of the pattern with the same source


def shares_of(weights: Sequence[float]) -> tuple[int, ...]:
    """Turns weights into numbers of sequences in a pattern.

    Args:
        weights: At least 0, one of them above 0; decimal numbers are taken as they are written.

    Returns:
        Whole numbers in the same proportions; if no pattern of at most 65,536 slots has these, the nearest, with at
        least one slot for every weight above 0.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    whole = [int(value * math.lcm(*(value.denominator for value in exact))) for value in exact]
    divisor = math.gcd(*whole)
    if sum(whole) // divisor <= MAXIMUM_PERIOD:
        return tuple(value // divisor for value in whole)
    return _nearest_shares(exact)


def _nearest_shares(weights: Sequence[Fraction]) -> tuple[int, ...]:
    """Largest remainders; slots for the smallest weights come from the largest share."""
    total = sum(weights)
    quotas = [weight * MAXIMUM_PERIOD / total for weight in weights]
    shares = [max(math.floor(quota), 1) if quota else 0 for quota in quotas]
    by_remainder = sorted(range(len(weights)), key=lambda index: (shares[index] - quotas[index], index))
    for index in by_remainder[: max(MAXIMUM_PERIOD - sum(shares), 0)]:
        shares[index] += 1
    shares[shares.index(max(shares))] += MAXIMUM_PERIOD - sum(shares)
    return tuple(shares)


class Mixture:
    """Maps positions of the mixed stream to positions of its sources; a pure function of its stages."""

    def __init__(self, stages: Sequence[MixtureStage]) -> None:
        """Lays out the stages.

        Args:
            stages: The first begins at 0, each later one behind the one before it.
        """
        self._begins = [stage.begin for stage in stages]
        self._shares = [stage.shares for stage in stages]
        self._cursors = [[0] * len(stages[0].shares)]
        for index in range(len(stages) - 1):
            length = self._begins[index + 1] - self._begins[index]
            counts = self._counts(index, length)
            self._cursors.append([a + b for a, b in zip(self._cursors[index], counts, strict=True)])

    def _counts(self, stage: int, length: int) -> list[int]:
        """How many of the first `length` sequences of a stage each source gives."""
        rounds, rest = divmod(length, sum(self._shares[stage]))
        begun = np.bincount(_pattern(self._shares[stage]).sources[:rest], minlength=len(self._shares[stage]))
        return [rounds * share + int(extra) for share, extra in zip(self._shares[stage], begun, strict=True)]

    def locate(self, position: int) -> SourcePosition:
        """Finds the source of a position.

        Args:
            position: Position in the mixed stream.

        Returns:
            The source and the position in it.
        """
        stage = bisect_right(self._begins, position) - 1
        shares = self._shares[stage]
        pattern = _pattern(shares)
        rounds, slot = divmod(position - self._begins[stage], len(pattern.sources))
        source = int(pattern.sources[slot])
        return SourcePosition(
            source, self._cursors[stage][source] + rounds * shares[source] + int(pattern.before[slot])
        )

    def first_repetition(self, sequences: Sequence[int]) -> int:
        """Finds how long the shares of the first stage last before a sequence comes again.

        Args:
            sequences: [sources] sequences per epoch of each source.

        Returns:
            Number of positions.
        """
        shares = self._shares[0]
        pattern = _pattern(shares)
        repetitions = []
        for source, (share, count) in enumerate(zip(shares, sequences, strict=True)):
            if share:
                rounds, rest = divmod(count, share)
                slot = int(np.flatnonzero(pattern.sources == source)[rest])
                repetitions.append(rounds * len(pattern.sources) + slot)
        return min(repetitions)


@lru_cache(maxsize=16)
def _pattern(shares: tuple[int, ...]) -> _Pattern:
    period = sum(shares)
    sources = np.empty(period, dtype=np.int64)
    before = np.empty(period, dtype=np.int64)
    given = [0] * len(shares)
    # Sequences not yet due by the slot they may come in, those that may come by the slot they must come before.
    later = [(0, source) for source, share in enumerate(shares) if share]
    due: list[tuple[int, int]] = []
    for slot in range(period):
        while later and later[0][0] <= slot:
            _, source = heapq.heappop(later)
            heapq.heappush(due, (-(-(given[source] + 1) * period // shares[source]), source))
        _, source = heapq.heappop(due)
        sources[slot], before[slot] = source, given[source]
        given[source] += 1
        if given[source] < shares[source]:
            heapq.heappush(later, (given[source] * period // shares[source], source))
    return _Pattern(sources, before)
