import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data.streaming.order import SequenceOrder, SequencePlace

counts_lists = st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(any)


def order(counts: list[int], *, seed: int = 0, shuffle: bool = True, window_shards: int = 3) -> SequenceOrder:
    return SequenceOrder(np.asarray(counts), seed=seed, shuffle=shuffle, window_shards=window_shards)


def places(sequences: SequenceOrder, position: int, count: int) -> list[SequencePlace]:
    return [sequences.place(index) for index in range(position, position + count)]


@given(counts_lists, st.integers(0, 99), st.booleans(), st.integers(1, 5), st.integers(0, 3))
def test_an_epoch_holds_every_sequence_once(
    counts: list[int], seed: int, shuffle: bool, window_shards: int, epoch: int
) -> None:
    sequences = order(counts, seed=seed, shuffle=shuffle, window_shards=window_shards)
    total = sequences.sequences_per_epoch
    every = {SequencePlace(epoch, shard, index) for shard, count in enumerate(counts) for index in range(count)}
    found = places(sequences, epoch * total, total)
    assert len(found) == total
    assert set(found) == every


@given(counts_lists, st.integers(1, 5), st.data())
def test_any_position_is_found_without_the_ones_before_it(
    counts: list[int], window_shards: int, data: st.DataObject
) -> None:
    total = sum(counts)
    position = data.draw(st.integers(0, 3 * total - 1))
    whole = places(order(counts, window_shards=window_shards), 0, 3 * total)
    assert places(order(counts, window_shards=window_shards), position, 1) == [whole[position]]


def test_shuffling_stays_within_windows_of_shards() -> None:
    counts = [5] * 12
    shards = [sample.shard for sample in places(order(counts, window_shards=4), 0, 60)]
    windows = [set(shards[start : start + 20]) for start in (0, 20, 40)]
    assert [len(window) for window in windows] == [4, 4, 4]
    assert set.union(*windows) == set(range(12))
    assert shards[:20] != sorted(shards[:20], key=shards.index)


def test_order_differs_by_epoch_and_seed() -> None:
    counts = [50, 40]

    def of_epoch(seed: int, epoch: int) -> list[tuple[int, int]]:
        return [sample[1:] for sample in places(order(counts, seed=seed), 90 * epoch, 90)]

    orders = [of_epoch(0, 0), of_epoch(0, 1), of_epoch(1, 0)]
    assert all(orders[a] != orders[b] for a, b in ((0, 1), (0, 2), (1, 2)))


def test_without_shuffling_the_order_is_that_of_the_manifest() -> None:
    expected = [
        (epoch, shard, index) for epoch in (0, 1) for shard, count in ((0, 2), (2, 1)) for index in range(count)
    ]
    assert places(order([2, 0, 1], shuffle=False), 0, 6) == expected


def test_the_order_never_changes() -> None:
    """A run that goes on under a later version must see the same sequences."""
    found = [sample[1:] for sample in places(order([3, 2, 4, 1], seed=7, window_shards=2), 10, 10)]
    assert found == [(0, 0), (0, 2), (3, 0), (0, 1), (2, 1), (2, 3), (1, 1), (1, 0), (2, 0), (2, 2)]
