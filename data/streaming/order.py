"""The order of sequences: a pure function of the sequence counts, the seed and the epoch."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Raise it whenever the order changes: it is part of stream fingerprints.
ORDER_VERSION = 1
CACHED_EPOCHS = 2
CACHED_WINDOWS = 4
SHARD_STREAM, SEQUENCE_STREAM = 0, 1


class SequencePlace(NamedTuple):
    """Where one sequence of the endless stream lies.

    Attributes:
        epoch: Pass over the split, from 0.
        shard: Index of the shard in the manifest.
        sequence: Index of the sequence in the shard.
    """

    epoch: int
    shard: int
    sequence: int


class _Epoch(NamedTuple):
    shards: NDArray[np.int64]  # [shards] shard at each place
    starts: NDArray[np.int64]  # [shards + 1] position of the first sequence of each place
    window_starts: NDArray[np.int64]  # [windows + 1] position of the first sequence of each window


def random_permutation(length: int, *seeds: int) -> NDArray[np.int64]:
    """Draws a permutation that no NumPy version changes.

    Args:
        length: Number of items.
        *seeds: Nonnegative integers that determine it.

    Returns:
        [length] a permutation of 0 to length-1.
    """
    # Generator.permutation may change between versions, raw bits may not; equal keys fall to the stable sort.
    keys = np.random.Philox(np.random.SeedSequence(list(seeds))).random_raw(length)
    return np.argsort(keys, kind="stable").astype(np.int64)


class SequenceOrder:
    """Maps positions of the endless stream to sequences of shards.

    Shards are permuted by (seed, epoch); then the sequences of each window of neighbouring shards are permuted by
    (seed, epoch, window). Without shuffling everything stays in the order of the manifest.
    """

    def __init__(self, counts: NDArray[np.int64], *, seed: int, shuffle: bool, window_shards: int) -> None:
        """Prepares the order; no permutation is drawn before it is needed.

        Args:
            counts: [shards] sequences of each shard.
            seed: Seed of the order.
            shuffle: Whether to permute at all.
            window_shards: Shards per window.
        """
        self.sequences_per_epoch = int(counts.sum())
        self._counts = counts
        self._seed = seed
        self._shuffle = shuffle
        self._window_shards = window_shards
        self._epoch = lru_cache(CACHED_EPOCHS)(self._draw_epoch)
        self._window = lru_cache(CACHED_WINDOWS)(self._draw_window)

    def _draw_epoch(self, epoch: int) -> _Epoch:
        shards = np.arange(len(self._counts))
        if self._shuffle:
            shards = random_permutation(len(self._counts), self._seed, SHARD_STREAM, epoch)
        starts = np.concatenate([[0], np.cumsum(self._counts[shards])])
        window_starts = np.append(starts[:-1][:: self._window_shards], starts[-1])
        return _Epoch(shards, starts, window_starts)

    def _draw_window(self, epoch: int, window: int) -> NDArray[np.int64]:
        window_starts = self._epoch(epoch).window_starts
        length = int(window_starts[window + 1] - window_starts[window])
        return random_permutation(length, self._seed, SEQUENCE_STREAM, epoch, window)

    def place(self, position: int) -> SequencePlace:
        """Finds the sequence at a position.

        Args:
            position: Runs on over epochs.

        Returns:
            Epoch, shard and number in the shard.
        """
        epoch, place = divmod(position, self.sequences_per_epoch)
        layout = self._epoch(epoch)
        if self._shuffle:
            window = _interval(layout.window_starts, place)
            window_start = int(layout.window_starts[window])
            place = window_start + int(self._window(epoch, window)[place - window_start])
        rank = _interval(layout.starts, place)
        return SequencePlace(epoch, int(layout.shards[rank]), place - int(layout.starts[rank]))

    def window(self, position: int) -> tuple[int, int]:
        """Names the shuffle window that a position falls into, as (epoch, number in the epoch)."""
        epoch, place = divmod(position, self.sequences_per_epoch)
        return epoch, _interval(self._epoch(epoch).window_starts, place)

    def shards_from(self, epoch: int, window: int, count: int) -> list[int]:
        """Names the shards that are read from a window on, in the order in which windows need them.

        Args:
            epoch: Epoch of the window.
            window: Its number in the epoch.
            count: Shards beyond the window's own.

        Returns:
            The shards of the window, and `count` more at most, on into the next epoch.
        """
        begin = window * self._window_shards
        following = [*self._epoch(epoch).shards[begin:], *self._epoch(epoch + 1).shards]
        return [int(shard) for shard in following[: self._window_shards + count]]


def _interval(starts: NDArray[np.int64], place: int) -> int:
    """Which of the intervals that begin at `starts` holds a place; empty ones hold none."""
    return int(starts.searchsorted(place, side="right")) - 1
