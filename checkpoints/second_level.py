"""Copies of published checkpoints in a second place, which may be an object store.

The place is anything that fsspec opens: a folder, `s3://bucket/folder` with s3fs installed, and so on. A copy's
manifest is written last, so that a copy without one is unfinished: object stores cannot rename folders.
"""

import secrets
import shutil
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec

from checkpoints.errors import CheckpointError
from checkpoints.records import MANIFEST
from checkpoints.store import STEP_NAME, CheckpointStore, verify_checkpoint


class SecondLevel:
    """Checkpoints of one run in a second place.

    Args:
        place: folder or URL that holds the run's step directories.

    Raises:
        CheckpointError: it cannot be opened.
    """

    def __init__(self, place: str) -> None:
        self.place = place
        try:
            self._files, self._root = fsspec.core.url_to_fs(place)
        except (ImportError, ValueError, OSError) as error:
            raise CheckpointError(f"checkpoint.copy_to={place} cannot be opened: {error}") from error

    def steps(self) -> list[int]:
        """Steps whose copies are complete, ascending.

        Raises:
            CheckpointError: the place refuses.
        """
        try:
            names = [Path(entry).name for entry in self._files.ls(self._root, detail=False)]
            steps = [int(match[1]) for name in names if (match := STEP_NAME.fullmatch(name))]
            return sorted(step for step in steps if self._files.exists(f"{self._path(step)}/{MANIFEST}"))
        except FileNotFoundError:
            return []
        except Exception as error:  # every kind of store has its own
            raise CheckpointError(f"cannot list checkpoint.copy_to={self.place}: {error}") from error

    def put(self, checkpoint: Path, keep: Iterable[int]) -> None:
        """Copies a published checkpoint and deletes the copies of steps that are not to be kept.

        Args:
            checkpoint: its step directory.
            keep: steps whose copies stay, besides this one.

        Raises:
            CheckpointError: the place refuses.
        """
        try:
            target = f"{self._root}/{checkpoint.name}"
            self._remove(target)
            self._files.makedirs(target, exist_ok=True)
            for path in sorted(checkpoint.iterdir(), key=lambda path: path.name == MANIFEST):
                self._files.put_file(str(path), f"{target}/{path.name}")
            kept = {f"step_{step:08d}" for step in keep} | {checkpoint.name}
            for step in self.steps():
                if Path(self._path(step)).name not in kept:
                    self._remove(self._path(step))
        except Exception as error:  # every kind of store has its own
            raise CheckpointError(f"cannot copy {checkpoint} to {self.place}: {error}") from error

    def fetch_newest(self, checkpoints: Path) -> Path | None:
        """Brings the newest complete copy back, in place of a damaged checkpoint of its step.

        Args:
            checkpoints: the run's own folder of step directories.

        Returns:
            The step directory, verified; None if there is no copy.

        Raises:
            CheckpointError: the place refuses, or the copy is damaged.
        """
        steps = self.steps()
        if not steps:
            return None
        target = checkpoints / Path(self._path(steps[-1])).name
        temporary = target.with_name(f"{target.name}.tmp-fetched")
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            for entry in self._files.ls(self._path(steps[-1]), detail=False):
                self._files.get_file(entry, str(temporary / Path(entry).name))
        except Exception as error:  # every kind of store has its own
            raise CheckpointError(f"cannot fetch step {steps[-1]} from {self.place}: {error}") from error
        verify_checkpoint(temporary)
        with suppress(FileNotFoundError):  # one that is there is damaged; the next save deletes it
            target.rename(target.with_name(f"{target.name}.deleted-{secrets.token_hex(8)}"))
        return temporary.rename(target)

    def _path(self, step: int) -> str:
        return f"{self._root}/step_{step:08d}"

    def _remove(self, path: str) -> None:
        """Deletes a copy, its manifest first: what is left of it is unfinished."""
        files: Any = self._files
        if files.exists(f"{path}/{MANIFEST}"):
            files.rm_file(f"{path}/{MANIFEST}")
        if files.exists(path):
            files.rm(path, recursive=True)


class BackgroundCopies:
    """Copies in a thread, one at a time; the newest of those published meanwhile comes next, others are left out."""

    def __init__(self, second_level: SecondLevel) -> None:
        self._second_level = second_level
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._next: tuple[Path, int, CheckpointStore] | None = None
        self._is_copying = False
        self._problems: list[str] = []

    @property
    def place(self) -> str:
        """Where the copies are."""
        return self._second_level.place

    def newest_step(self) -> int | None:
        """The newest complete copy's step."""
        return max(self._second_level.steps(), default=None)

    def fetch_newest(self, checkpoints: Path) -> Path | None:
        """See SecondLevel.fetch_newest."""
        return self._second_level.fetch_newest(checkpoints)

    def start(self, checkpoint: Path, store: CheckpointStore) -> None:
        """Begins to copy a published checkpoint, which the store keeps until then."""
        step = int(checkpoint.name.removeprefix("step_"))
        store.hold(step)
        with self._lock:
            left_out, self._next = self._next, (checkpoint, step, store)
            if not self._is_copying:
                self._is_copying = True
                self._thread = threading.Thread(target=self._copy_all, name="checkpoint-copying", daemon=True)
                self._thread.start()
        if left_out is not None:
            store.release(left_out[1])
            self._problems.append(f"{left_out[0].name} is not copied to {self.place}: there is a newer one already")

    def _copy_all(self) -> None:
        while True:
            with self._lock:
                following, self._next = self._next, None
                if following is None:
                    self._is_copying = False
                    return
            self._copy(*following)

    def _copy(self, checkpoint: Path, step: int, store: CheckpointStore) -> None:
        try:
            self._second_level.put(checkpoint, store.kept())
        except CheckpointError as error:
            self._problems.append(str(error))
        finally:
            store.release(step)

    def wait(self) -> None:
        """Waits for the copies under way, if any."""
        if self._thread is not None:
            self._thread.join()

    def problems(self) -> list[str]:
        """What went wrong since the last call."""
        problems, self._problems = self._problems, []
        return problems
