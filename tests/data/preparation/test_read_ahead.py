import threading
import time
from collections.abc import Callable, Iterator

import pytest

from data.preparation.read_ahead import read_ahead


def sources(counts: list[int], started: list[int], read: list[int]) -> Iterator[Callable[[], Iterator[int]]]:
    """Source n gives n * 100, n * 100 + 1, ... and notes what was read; a negative count fails after as many."""

    def begin(number: int, count: int) -> Iterator[int]:
        started.append(number)
        for item in range(abs(count)):
            read.append(number)
            yield number * 100 + item
        if count < 0:
            raise ValueError(f"source {number} failed")

    return (lambda number=number, count=count: begin(number, count) for number, count in enumerate(counts))


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_items_come_in_order_and_errors_in_their_place(threads: int) -> None:
    started: list[int] = []
    items = read_ahead(sources([3, 0, 50, 2, -1, 5], started, []), threads, 2)
    found = [next(items) for _ in range(56)]
    assert found == [*range(3), *range(200, 250), 300, 301, 400]
    with pytest.raises(ValueError, match="source 4 failed"):
        next(items)
    assert sorted(started) == list(range(6 if threads == 3 else 5))


def test_reading_ahead_is_bounded_and_ends_with_the_consumer() -> None:
    started: list[int] = []
    read: list[int] = []
    before = threading.active_count()
    items = read_ahead(sources([1000, 1000, 1000, 1000], started, read), 2, 5)
    assert next(items) == 0
    # Five in the queue, one in hand; of the first, one is consumed.
    deadline = time.monotonic() + 30
    while (read.count(0), read.count(1)) != (7, 6):
        assert time.monotonic() < deadline, read
        time.sleep(0.01)
    time.sleep(0.05)
    assert (len(read), sorted(started)) == (13, [0, 1])
    items.close()  # type: ignore[attr-defined]
    for _ in range(1500):
        if threading.active_count() <= before:
            break
        time.sleep(0.02)
    assert threading.active_count() <= before
