"""Deleting directories without holding up the run."""

import shutil
import threading
from collections.abc import Sequence
from pathlib import Path


class BackgroundDeleter:
    """Deletes directory trees in background threads; what fails is left for the next attempt."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self._pending: set[Path] = set()

    def delete(self, directories: Sequence[Path]) -> None:
        """Start deleting; returns at once."""
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        fresh = [path for path in directories if path not in self._pending]
        if not fresh:
            return
        self._pending.update(fresh)
        # A daemon: a process that ends leaves the rest to the next one.
        thread = threading.Thread(target=self._remove, args=(fresh,), name="checkpoint-deletion", daemon=True)
        self._threads.append(thread)
        thread.start()

    def wait(self) -> None:
        """Block until everything that was asked for has been tried."""
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _remove(self, directories: Sequence[Path]) -> None:
        for directory in directories:
            shutil.rmtree(directory, ignore_errors=True)
            self._pending.discard(directory)
