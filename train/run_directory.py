"""A run's folder: its configuration, the lock of its one writer, and where everything goes.

`runs/<name>/` holds config.yaml (resolved, of the latest attempt), checkpoints/ (step directories of the checkpoint
store), tensorboard/ (events) and submitit/ (a folder per attempt: job files, one log per process).
"""

import errno
import fcntl
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from checkpoints.files import write_durably
from parallel.errors import ConfigurationError
from train.config import RunConfig
from train.config_file import config_text

# What may differ between attempts of one run: the result is the same, or the identity of the data decides.
CHANGEABLE = (
    "run.name",
    "run.root",
    "run.initial_weights",  # read before the first step only
    "parallel.",
    "data.path",
    "data.sources",
    "data.stages",
    "data.tokenizer",
    "data.cache.",
    "data.bad_shards",
    "train.stop_step",
    "train.micro_batch_size",
    "train.cpu_threads",
    "train.profile",
    "validation.",
    "tasks.",
    "checkpoint.",
    "logging.",
    "stability.",
)
# Some cluster file systems have no locks; there the user must not start the same run twice.
NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK})


class RunDirectory:
    """Paths of one run."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.path = config.directory
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.submitit = self.path / "submitit"
        self._config_file = self.path / "config.yaml"
        self._lock: int | None = None

    def check(self) -> None:
        """Checks that this configuration may go on with the run that is there, if any.

        Raises:
            ConfigurationError: the run was made with other settings, which are listed, or its record of them is
                damaged.
        """
        if self._config_file.is_file():
            self.check_against(self._recorded())

    def check_against(self, recorded: dict[str, Any]) -> None:
        """Checks that this configuration may go on with a run that was made with a recorded one.

        Raises:
            ConfigurationError: settings differ that make another run; lists them.
        """
        there = flatten(recorded)
        here = flatten(yaml.safe_load(config_text(self.config)))
        changed = [
            f"{name} is {there.get(name)!r} there and {here.get(name)!r} here"
            for name in sorted(there.keys() | here.keys())
            if there.get(name) != here.get(name) and not name.startswith(CHANGEABLE)
        ]
        if changed:
            raise ConfigurationError(
                f"run {self.config.run.name} exists in {self.path} with another config: {'; '.join(changed)}; "
                "choose another run.name or restore these values"
            )

    def _recorded(self) -> dict[str, Any]:
        try:
            values = yaml.safe_load(self._config_file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            values = None
        if not isinstance(values, dict):
            raise ConfigurationError(
                f"{self._config_file} cannot be read as YAML; restore it, or delete it if you are sure that the run "
                "was made with this config"
            )
        return values

    def new_attempt(self) -> Path:
        """Makes a folder for the job files of one attempt.

        Submitit names files by process id, which come again, in containers at every start: one folder would mix up
        the logs and results of different attempts.

        Raises:
            ConfigurationError: the folder cannot be written.
        """
        with self._writing():
            folder = self.submitit / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
            folder.mkdir(parents=True)
        return folder

    def open(self) -> None:
        """Makes the folder, claims the run for this process until it ends, and records the configuration.

        Raises:
            ConfigurationError: the folder cannot be written, another process is writing the run, or it was made with
                other settings.
        """
        with self._writing():
            for folder in (self.checkpoints, self.tensorboard, self.submitit):
                folder.mkdir(parents=True, exist_ok=True)
            self._claim()
            self.check()
            temporary = self._config_file.with_suffix(".tmp")
            write_durably(temporary, config_text(self.config))
            os.replace(temporary, self._config_file)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigurationError(
                f"run folder {self.path} cannot be written: {error.strerror}; change run.root or free space"
            ) from None

    def _claim(self) -> None:
        lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(lock, 200, 0).decode(errors="replace").strip()
            os.close(lock)
            raise ConfigurationError(
                f"run {self.config.run.name} is being written by another job ({owner or 'unknown process'}); "
                "end it there with kill and that number, or choose another run.name"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        self._lock = lock

    def close(self) -> None:
        """Gives the run free."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def writer_of(run: Path) -> str | None:
    """The process that is writing a run, in words; None if none is, or the file system has no locks."""
    try:
        with (run / ".lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return (run / ".lock").read_text(encoding="utf-8").strip() or "unknown process"
    except OSError:
        pass
    return None


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
