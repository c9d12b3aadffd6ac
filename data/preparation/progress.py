"""Shows how far a long job is: a bar on a terminal, a plain line now and then in a log."""

import sys
import time
from datetime import timedelta
from types import TracebackType

import tqdm

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """A context manager around the job."""

    def __init__(self, title: str, unit: str, total: int, done: int = 0, shown: bool = True) -> None:
        """Prepares the display.

        Args:
            title: What is being done.
            unit: What is counted.
            total: How much there is.
            done: How much of it was done by an earlier run.
            shown: Whether to show anything.
        """
        self._title, self._unit, self._total = title, unit, total
        self._done = self._done_before = done
        self._tokens = 0
        self._started = self._last_line = time.monotonic()
        on_terminal = sys.stderr.isatty()
        self._prints_lines = shown and not on_terminal
        self._bar = tqdm.tqdm(
            desc=title,
            total=total,
            initial=done,
            unit=unit,
            unit_scale=True,
            dynamic_ncols=True,
            disable=not (shown and on_terminal),
        )

    def __enter__(self) -> "Progress":
        """Begins."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leaves the bar as it is."""
        self._bar.close()

    def update(self, amount: int, tokens: int = 0) -> None:
        """Counts what was done.

        Args:
            amount: Units.
            tokens: Tokens in them; where there are none, no rate is shown.
        """
        self._done += amount
        self._tokens += tokens
        now = time.monotonic()
        rate = f"{self._tokens / max(now - self._started, 1e-9):,.0f} tokens/s" if self._tokens else ""
        self._bar.set_postfix_str(rate, refresh=False)
        self._bar.update(amount)
        if self._prints_lines and now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            print(self._line(now - self._started, rate), file=sys.stderr, flush=True)

    def _line(self, seconds: float, rate: str) -> str:
        share = self._done / max(self._total, 1)
        new = self._done - self._done_before
        left = timedelta(seconds=round(seconds * (self._total - self._done) / new)) if new else "unknown time"
        parts = [f"{self._title}: {share:.1%} of {self._total:,} {self._unit}", rate, f"{left} left"]
        return ", ".join(part for part in parts if part)
