"""Writes results where others look for them: a JSON file, TensorBoard and plots."""

import contextlib
import fcntl
import json
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from checkpoints.files import write_durably
from evaluation.result import EvaluationResult
from parallel.errors import ConfigurationError

RESULTS_FILE = "results.json"


class Report:
    """The results of one model; each is on the disk as soon as it is added.

    Args:
        folder: Where `results.json` and plots/ go. Results that lie there already stay, but those of the same name.
        tensorboard: Folder of the event files; not that of a run's own, whose writer may be at work.
        run: Name of the run.
        step: Optimizer step of the model.

    Raises:
        ConfigurationError: The folder cannot be written, or holds something else.
    """

    def __init__(self, folder: Path, tensorboard: Path, run: str, step: int) -> None:
        self.folder, self.tensorboard = folder, tensorboard
        self._model = {"run": run, "step": step}
        self.step = step
        with self._explained():
            folder.mkdir(parents=True, exist_ok=True)
            self._read()

    def add(self, result: EvaluationResult) -> list[Path]:
        """Writes a result.

        Returns:
            The plots.

        Raises:
            ConfigurationError: The disk is full, or the folder cannot be written any more.
        """
        with self._explained():
            with self._locked():
                results = self._read() | {result.name: _finite(result.to_json())}
                temporary = self.folder / f"{RESULTS_FILE}.{os.getpid()}"
                write_durably(temporary, json.dumps({**self._model, "results": results}, indent=1) + "\n")
                os.replace(temporary, self.folder / RESULTS_FILE)
            with SummaryWriter(str(self.tensorboard)) as writer:
                for tag, value in result.scalars().items():
                    writer.add_scalar(f"evaluation/{result.name}/{tag}", value, self.step)
            return self._draw(result)

    def _draw(self, result: EvaluationResult) -> list[Path]:
        """Puts whole plots in their place; a folder for none would be of no use."""
        plots = self.folder / "plots"
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".plots") as temporary:
            drawn = result.draw(Path(temporary))
            if drawn:
                plots.mkdir(exist_ok=True)
            return [path.rename(plots / path.name) for path in drawn]

    def _read(self) -> dict[str, Any]:
        """The results in the file."""
        path = self.folder / RESULTS_FILE
        if not path.exists():
            return {}
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            model = {name: content[name] for name in self._model}
            results = dict(content["results"])
        except (ValueError, KeyError, TypeError):
            raise ConfigurationError(f"{path} holds no results of this tool; move it away, or use --output") from None
        if model != self._model:
            raise ConfigurationError(
                f"{path} holds the results of step {model['step']} of {model['run']}; name another folder with --output"
            )
        return results

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keeps other processes from changing the file; where the file system has no locks, nothing does."""
        descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigurationError(
                f"results cannot be written to {self.folder}: {error.strerror}; name another folder with --output"
            ) from None


def _finite(value: Any) -> Any:
    """A value of which JSON can hold everything: infinities and NaN become None."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
