"""Ends a rank that makes no progress, with the stack of all its threads in the log.

A thread explains and prints the stacks. Some time later, so that all ranks have done so, the interpreter's own watchdog
ends the process: it is written in C and also works where a library holds the interpreter's lock.
"""

import faulthandler
import math
import sys
import threading
import time
from collections.abc import Callable

LONGEST_WAIT_SECONDS = 60.0
GRACE_FRACTION, MINIMUM_GRACE_SECONDS = 0.1, 5.0


class HangGuard:
    """Must be told of progress more often than its timeout.

    Args:
        timeout: seconds without progress after which the process prints its stacks to stderr. A little later it prints
            them again and exits with status 1.
        explain: called before the first print.
    """

    def __init__(self, timeout: float, explain: Callable[[], None] = lambda: None) -> None:
        self.timeout = timeout
        self._explain = explain
        self._stopped = threading.Event()
        self.progress()
        threading.Thread(target=self._watch, name="hang-guard", daemon=True).start()

    def progress(self) -> None:
        """Starts the time anew."""
        self._explain_at = time.monotonic() + self.timeout
        grace = max(MINIMUM_GRACE_SECONDS, GRACE_FRACTION * self.timeout)
        faulthandler.dump_traceback_later(self.timeout + grace, exit=True)

    def stop(self) -> None:
        """Stops watching."""
        self._stopped.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._stopped.wait(min(LONGEST_WAIT_SECONDS, max(0.01, self._explain_at - time.monotonic()))):
            if time.monotonic() >= self._explain_at:
                self._explain()
                faulthandler.dump_traceback(sys.stderr)
                self._explain_at = math.inf  # until there is progress again
