"""What is known of a run from its folder alone: where it stands, how fast it goes, why attempts ended."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints.store import CheckpointStore
from parallel.errors import ConfigurationError
from train.attempts import UNKNOWN_END, Attempt, read_attempts
from train.config import RunConfig
from train.config_file import recorded_config

PROGRESS_FILE = "progress.json"
SILENCE_SECONDS = 600.0


@dataclass(frozen=True)
class RunStatus:
    """A run at this moment.

    Attributes:
        config: its settings.
        state: `complete`, `running`, `silent`, `stopped` or `not started`.
        attempts: its history.
        step: the newest one known.
        loss: of that step.
        tokens_per_second: at that time.
        checkpoint: the newest complete one's step.
    """

    config: RunConfig
    state: str
    attempts: list[Attempt]
    step: int
    loss: float | None
    tokens_per_second: float | None
    checkpoint: int | None

    @property
    def seconds_left(self) -> float | None:
        """Time to the last step at the present speed."""
        if self.state != "running" or not self.tokens_per_second:
            return None
        left = self.config.train.last_step - self.step
        return left * self.config.tokens_per_step / self.tokens_per_second

    @property
    def last_end(self) -> str | None:
        """Why the newest attempt that is over ended."""
        over = self.attempts[:-1] if self.state in ("running", "silent") else self.attempts
        return (over[-1].reason or UNKNOWN_END) if over else None


def read_status(folder: Path) -> RunStatus:
    """Reads a run's folder.

    Raises:
        ConfigurationError: it holds no run.
    """
    config = _config(folder)
    attempts = read_attempts(folder)
    progress = _progress(folder)
    steps = CheckpointStore(folder / "checkpoints").complete_steps()
    newest = steps[-1] if steps else None
    return RunStatus(
        config=config,
        state=_state(config, attempts, progress, newest),
        attempts=attempts,
        step=max(int(progress.get("step", 0)), newest or 0),
        loss=progress.get("loss"),
        tokens_per_second=progress.get("tokens_per_second"),
        checkpoint=newest,
    )


def _config(folder: Path) -> RunConfig:
    if not (folder / "config.yaml").is_file():
        raise ConfigurationError(f"{folder} is not the folder of a run; give one such as runs/NAME")
    return recorded_config(folder / "config.yaml")


def _progress(folder: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values


def _state(config: RunConfig, attempts: list[Attempt], progress: dict[str, Any], newest: int | None) -> str:
    if newest is not None and newest >= config.train.last_step:
        return "complete"
    if not attempts:
        return "not started"
    if attempts[-1].ended is not None:
        return "stopped"
    heard = max(float(progress.get("time", 0.0)), attempts[-1].started)
    return "running" if time.time() - heard < SILENCE_SECONDS else "silent"


def describe(status: RunStatus) -> str:
    """The status in a few lines."""
    config, lines = status.config, [f"{status.config.run.name}: {status.state}"]
    tokens = status.step * config.tokens_per_step
    lines.append(f"  step {status.step} of {config.train.last_step}, {tokens:,} tokens")
    if status.loss is not None and status.tokens_per_second is not None:
        lines.append(f"  loss {status.loss:.4f}, {status.tokens_per_second:,.0f} tokens/s")
    if status.seconds_left is not None:
        lines.append(f"  {status.seconds_left / 3600:.1f} hours left")
    lines.append("  no checkpoint" if status.checkpoint is None else f"  newest checkpoint: step {status.checkpoint}")
    if status.attempts:
        newest = status.attempts[-1]
        job = f", job {newest.job}" if newest.job else ""
        lines.append(f"  attempt {newest.number} on {newest.host}{job}, from step {newest.step}: {newest.layout}")
    if status.last_end:
        lines.append(f"  the last attempt that is over: {status.last_end}")
    return "\n".join(lines)
