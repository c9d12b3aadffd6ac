"""Reads several sources in threads, ahead of the one who consumes them in order."""

import collections
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")
# How long a thread that waits for room takes to notice that nobody consumes any more, in seconds.
PATIENCE = 0.1


class _End:
    """Stands behind the last item of a source."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error


class _Source(Generic[Item]):
    """One source with the thread that reads it."""

    def __init__(self, read: Callable[[], Iterator[Item]], items_ahead: int, stopped: threading.Event) -> None:
        self._read = read
        self._items: queue.Queue[Item | _End] = queue.Queue(items_ahead)
        self._stopped = stopped
        threading.Thread(target=self._fill, daemon=True).start()

    def _fill(self) -> None:
        try:
            for item in self._read():
                if not self._put(item):
                    return
            self._put(_End(None))
        except Exception as error:
            self._put(_End(error))

    def _put(self, item: Item | _End) -> bool:
        while not self._stopped.is_set():
            try:
                self._items.put(item, timeout=PATIENCE)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[Item]:
        while True:
            item = self._items.get()
            if not isinstance(item, _End):
                yield item
            elif item.error is not None:
                raise item.error
            else:
                return


def read_ahead(sources: Iterable[Callable[[], Iterator[Item]]], threads: int, items_ahead: int) -> Iterator[Item]:
    """Yields the items of all sources, one source after the other.

    Args:
        sources: Functions that begin to read.
        threads: Sources that are read at the same time; with 0 the caller's thread reads.
        items_ahead: Items that each thread reads ahead at most.

    Yields:
        The items in order.

    Raises:
        Exception: Whatever a source raised, in its place.
    """
    if threads == 0:
        for read in sources:
            yield from read()
        return
    stopped = threading.Event()
    remaining = iter(sources)
    open_sources: collections.deque[_Source[Item]] = collections.deque()
    try:
        while True:
            while len(open_sources) < threads and (begin := next(remaining, None)) is not None:
                open_sources.append(_Source(begin, items_ahead, stopped))
            if not open_sources:
                return
            yield from open_sources[0]
            open_sources.popleft()
    finally:
        stopped.set()
