"""Ends a rank that makes no progress, with the stack of all its threads in the log.

The interpreter's own watchdog does it, in a thread of C: it also works where a library holds the interpreter's lock.
"""

import faulthandler


class HangGuard:
    """Must be told of progress more often than its timeout.

    Args:
        timeout: seconds without progress after which the process prints its stacks to stderr and exits with status 1.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.progress()

    def progress(self) -> None:
        """Starts the time anew."""
        faulthandler.dump_traceback_later(self.timeout, exit=True)

    def stop(self) -> None:
        """Stops watching."""
        faulthandler.cancel_dump_traceback_later()
