"""Notes the signals that end a job, so that the loop can save and leave at the next step boundary."""

import signal
from types import FrameType

# Schedulers warn with any of SIGTERM, SIGUSR1 and SIGUSR2; SIGINT and SIGHUP come from a person's terminal.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)


class StopSignals:
    """Handlers that only set a flag; a second signal changes nothing, so it cannot tear a checkpoint."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def restore(self) -> None:
        """Puts the previous handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
