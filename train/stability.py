"""Decides whether a step is applied: non-finite losses are skipped, spikes treated as configured.

The decision uses only what all ranks have agreed on, so all decide alike.
"""

import math
import statistics
from collections import deque
from enum import Enum

from parallel.errors import ConfigurationError
from train.checkpointing import Progress
from train.config import StabilityConfig
from train.metrics import MeanLoss

MAX_ROLL_BACKS = 3
ADVICE = "lower optimizer.learning_rate, lengthen optimizer.warmup_steps or look at the data"


class Verdict(Enum):
    """What to do with a step's gradients."""

    APPLY = "apply"
    SKIP = "skip"
    ROLL_BACK = "roll back"


class LossWatch:
    """Watches the training loss under a policy."""

    def __init__(self, config: StabilityConfig) -> None:
        self.config = config
        self._recent: deque[float] = deque(maxlen=config.spike_window)
        self._roll_backs = 0
        self._spike_step = 0

    def judge(self, loss: MeanLoss) -> tuple[Verdict, str | None]:
        """Decides on a step from its loss.

        Returns:
            The verdict, and what is wrong with the loss, if anything.
        """
        if loss.targets == 0:
            return Verdict.APPLY, None
        if not math.isfinite(loss.loss):
            return Verdict.SKIP, f"the loss is {loss.loss}"
        spike = self._spike(loss.loss)
        if spike is None:
            self._recent.append(loss.loss)
            return Verdict.APPLY, None
        verdicts = {"warn": Verdict.APPLY, "skip": Verdict.SKIP, "roll_back": Verdict.ROLL_BACK}
        return verdicts[self.config.spike_policy], spike

    @property
    def recent_losses(self) -> tuple[float, ...]:
        """What a spike is measured against; to be kept with a checkpoint. Empty if nothing ever is a spike."""
        return () if self.config.spike_deviations is None else tuple(self._recent)

    def restore(self, recent_losses: tuple[float, ...]) -> None:
        """Goes on from what was kept."""
        self._recent.clear()
        self._recent.extend(recent_losses)

    def check_skipped(self, progress: Progress, reason: str) -> None:
        """Checks how many steps in a row went without an update.

        Raises:
            ConfigurationError: too many.
        """
        if progress.skipped_in_a_row >= self.config.max_skipped_steps:
            raise ConfigurationError(
                f"{progress.skipped_in_a_row} steps in a row up to step {progress.step} were skipped, the last because "
                f"{reason}; {ADVICE}, and start again from an older checkpoint (stability.max_skipped_steps="
                f"{self.config.max_skipped_steps})"
            )

    def rolled_back(self, step: int, reason: str) -> None:
        """Counts a return to the newest checkpoint.

        Raises:
            ConfigurationError: too many without a checkpoint past the spike.
        """
        self._roll_backs += 1
        self._spike_step = step
        if self._roll_backs > MAX_ROLL_BACKS:
            raise ConfigurationError(
                f"the run rolled back {MAX_ROLL_BACKS} times without a checkpoint past the spike, and at step {step} "
                f"again {reason}; {ADVICE}"
            )

    def saved(self, step: int) -> None:
        """A checkpoint has been written: if it lies past the spike, the run got on."""
        if step >= self._spike_step:
            self._roll_backs = 0

    def _spike(self, loss: float) -> str | None:
        """What makes this loss a spike: it lies far above the recent ones."""
        if self.config.spike_deviations is None or len(self._recent) < self.config.spike_window:
            return None
        mean, deviation = statistics.fmean(self._recent), statistics.stdev(self._recent)
        limit = mean + self.config.spike_deviations * deviation
        if loss <= limit:
            return None
        return f"the loss {loss:.4f} is above {limit:.4f}, {self.config.spike_deviations:g} deviations over the mean"
