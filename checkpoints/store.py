"""A directory of checkpoints in which a step is visible only when it is complete.

Layout of the root:

    latest                      name of the newest step directory, for people and scripts
    step_00000123/              a published checkpoint: manifest.json and the files it lists
    step_00000123.tmp-3f2a.../  being written
    step_00000123.old-3f2a.../  replaced by a newer version of the same step
    step_00000123.deleted-3f2a.../  retired, being deleted

One process (rank 0 of one job) owns the root and calls ``begin``, ``publish`` and ``prune``. Any number may read.
"""

import os
import re
import secrets
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints.coverage import check_coverage
from checkpoints.errors import CheckpointError
from checkpoints.files import sha256_of, storage_error, sync_directory, write_durably
from checkpoints.records import MANIFEST, FileRecord, Manifest, read_manifest
from checkpoints.retention import BackgroundDeleter

LATEST = "latest"
STEP_NAME = re.compile(r"step_(\d{8,})")
TEMPORARY_NAME = re.compile(r"step_\d{8,}\.tmp-\w+")
RETIRED_NAME = re.compile(r"step_\d{8,}\.deleted-\w+")
ASIDE_NAME = re.compile(r"(step_(\d{8,}))\.old-\w+")
CHECKSUM_THREADS = 8


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A published checkpoint, ready to be read with ``FragmentReader(path)``.

    Attributes:
        step: Optimizer step.
        path: Its directory.
        metadata: What ``publish`` was given.
        files: Names of its files.
        skipped: Newer steps that were passed over, each with the reason.
    """

    step: int
    path: Path
    metadata: dict[str, Any]
    files: tuple[str, ...]
    skipped: tuple[tuple[int, str], ...] = ()


def verify_checkpoint(path: Path, checksums: bool = True) -> Manifest:
    """Check that a published checkpoint is complete.

    Args:
        path: The step directory.
        checksums: Also read every file and compare its checksum; otherwise only existence and size.

    Returns:
        Its manifest.

    Raises:
        CheckpointError: Something is missing or damaged; the message names the file.
    """
    manifest = read_manifest(path)
    for record in manifest.files:
        _check_size(path, record)
    if checksums:
        with ThreadPoolExecutor(min(CHECKSUM_THREADS, os.cpu_count() or 1)) as pool:
            list(pool.map(lambda record: _check_checksum(path, record), manifest.files))
    return manifest


def _check_size(directory: Path, record: FileRecord) -> None:
    path = directory / record.name
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path} is unreadable: {error.strerror}") from error
    if size != record.bytes:
        raise CheckpointError(f"{path} has {size} bytes instead of {record.bytes}")


def _check_checksum(directory: Path, record: FileRecord) -> None:
    path = directory / record.name
    try:
        found = sha256_of(path)
    except OSError as error:
        raise CheckpointError(f"{path} is unreadable: {error.strerror}") from error
    if found != record.sha256:
        raise CheckpointError(f"{path} is damaged: its checksum does not match the manifest")


class CheckpointStore:
    """Writes, finds, checks and retires checkpoints.

    Args:
        root: Directory of the checkpoints; created at the first ``begin``.
        keep_last: How many of the newest checkpoints ``prune`` keeps, at least 1.
        keep_every: ``prune`` also keeps steps that this number divides; None for none.

    Raises:
        CheckpointError: A retention number is below 1.
    """

    def __init__(self, root: Path, keep_last: int = 2, keep_every: int | None = None) -> None:
        for field, value in (("keep_last", keep_last), ("keep_every", keep_every)):
            if value is not None and value < 1:
                raise CheckpointError(f"{field} is {value}: set it to 1 or more")
        self.root = Path(root)
        self.keep_last = keep_last
        self.keep_every = keep_every
        self._deleter = BackgroundDeleter()
        self._writing: set[Path] = set()
        self._last_published: int | None = None
        self._damaged: set[int] = set()
        self._held: set[int] = set()

    def begin(self, step: int) -> Path:
        """Start a checkpoint: clear what dead writers left and make a fresh temporary directory.

        Args:
            step: Optimizer step, 0 or more.

        Returns:
            The directory into which every rank writes its files.

        Raises:
            CheckpointError: The directory cannot be made.
        """
        temporary = self.root / f"{_step_name(step)}.tmp-{secrets.token_hex(8)}"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._clear_leftovers()
            temporary.mkdir()
            sync_directory(self.root)
        except OSError as error:
            raise storage_error(temporary, error) from error
        self._writing.add(temporary)
        return temporary

    def discard(self, temporary: Path) -> None:
        """Give up a checkpoint that was begun; removes its directory."""
        self._writing.discard(temporary)
        shutil.rmtree(temporary, ignore_errors=True)

    def publish(self, step: int, temporary: Path, records: Sequence[FileRecord], metadata: dict[str, Any]) -> Path:
        """Make a checkpoint visible, after all ranks have written their files.

        An existing checkpoint of the same step is replaced; until then it stays readable.

        Args:
            step: The step given to ``begin``.
            temporary: The directory ``begin`` returned.
            records: The records of all files of all ranks.
            metadata: What the run wants back at resume; JSON values only.

        Returns:
            The step directory.

        Raises:
            CheckpointError: A file or a range of a parameter is missing, or the disk refuses. The temporary
                directory is removed and older checkpoints are untouched.
        """
        target = self.root / _step_name(step)
        try:
            self._seal(temporary, Manifest(step, tuple(records), metadata))
            # Written before the step becomes visible: what follows needs no more space on the disk.
            pointer = self.root / f".{LATEST}.tmp"
            write_durably(pointer, target.name + "\n")
            self._swap_in(temporary, target)
            os.replace(pointer, self.root / LATEST)
            sync_directory(self.root)
        except CheckpointError:
            self.discard(temporary)
            raise
        except OSError as error:
            self.discard(temporary)
            raise storage_error(temporary, error) from error
        self._writing.discard(temporary)
        self._last_published = step
        self._damaged.discard(step)
        self._deleter.delete(self._replaced())
        return target

    def complete_steps(self) -> list[int]:
        """Steps whose files are all present in full size, ascending; checksums are not read."""
        return sorted(step for step, path in self._published().items() if _is_complete(path))

    def newest(self, verify: bool = True) -> LoadedCheckpoint | None:
        """Find the newest complete checkpoint.

        Args:
            verify: Compare the checksums of all files, not only their sizes.

        Returns:
            The checkpoint with the list of newer ones that were skipped, or None if nothing was ever published.

        Raises:
            CheckpointError: There are checkpoints and none is usable.
        """
        skipped: list[tuple[int, str]] = []
        for step, path in sorted(self._published().items(), reverse=True):
            try:
                return _loaded(path, verify_checkpoint(path, checksums=verify), skipped)
            except CheckpointError as error:
                skipped.append((step, str(error)))
                self._damaged.add(step)
        if not skipped:
            return None
        reasons = "; ".join(f"step {step}: {reason}" for step, reason in skipped)
        raise CheckpointError(f"no checkpoint in {self.root} is usable ({reasons}); remove the directory to start over")

    def at_step(self, step: int, verify: bool = True) -> LoadedCheckpoint:
        """Find the checkpoint of one step.

        Raises:
            CheckpointError: It does not exist or is damaged.
        """
        path = self._published().get(step)
        if path is None:
            known = ", ".join(str(number) for number in self.complete_steps()) or "none"
            raise CheckpointError(f"{self.root} has no checkpoint of step {step}; complete steps: {known}")
        return _loaded(path, verify_checkpoint(path, checksums=verify))

    def prune(self) -> list[int]:
        """Retire old checkpoints: hide them now, delete them in the background.

        The newest ``keep_last``, the multiples of ``keep_every`` and the one published last stay. Steps that
        ``newest`` found damaged do not count, and are deleted once an intact newer one exists.

        Returns:
            The steps that were retired.
        """
        retired, published = self.retirable(), self._published()
        self._hide_and_delete([published[step] for step in retired])
        return retired

    def retirable(self) -> list[int]:
        """The steps that ``prune`` would retire now."""
        intact = [step for step in self.complete_steps() if step not in self._damaged]
        if not intact:
            return []
        keep = set(intact[-self.keep_last :]) | {self._last_published} | self._held
        if self.keep_every is not None:
            keep.update(step for step in intact if step % self.keep_every == 0)
        return sorted(step for step in self._published() if step < intact[-1] and step not in keep)

    def kept(self) -> list[int]:
        """The complete steps that ``prune`` leaves."""
        retired = set(self.retirable())
        return [step for step in self.complete_steps() if step not in retired]

    def hold(self, step: int) -> None:
        """Keep a step from being retired until ``release``: it is being read."""
        self._held.add(step)

    def release(self, step: int) -> None:
        """Let a held step be retired again."""
        self._held.discard(step)

    def published(self) -> dict[int, Path]:
        """All published steps, ascending, with their directories; damaged ones too."""
        return dict(sorted(self._published().items()))

    def wait(self) -> None:
        """Block until background deletion has ended; for tests and for a tidy exit."""
        self._deleter.wait()

    def _seal(self, temporary: Path, manifest: Manifest) -> None:
        """Check that every rank delivered, then write the manifest and force everything to the disk."""
        for record in manifest.files:
            _check_size(temporary, record)
        check_coverage(fragment for record in manifest.files for fragment in record.fragments)
        write_durably(temporary / MANIFEST, manifest.to_json())
        sync_directory(temporary)

    def _swap_in(self, temporary: Path, target: Path) -> None:
        """Rename into place; a version set aside stays readable under its other name until then."""
        if target.exists():
            os.rename(target, target.with_name(f"{target.name}.old-{secrets.token_hex(8)}"))
        os.rename(temporary, target)
        sync_directory(self.root)

    def _entries(self) -> list[Path]:
        try:
            return sorted(self.root.iterdir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(f"cannot list checkpoints in {self.root}: {error.strerror}") from error

    def _published(self) -> dict[int, Path]:
        """Step directories; a version set aside counts while its replacement is not there."""
        found: dict[int, Path] = {}
        for path in self._entries():
            aside = ASIDE_NAME.fullmatch(path.name)
            if aside:
                found.setdefault(int(aside.group(2)), path)
        for path in self._entries():
            match = STEP_NAME.fullmatch(path.name)
            if match:
                found[int(match.group(1))] = path
        return found

    def _replaced(self) -> list[Path]:
        matches = [(path, ASIDE_NAME.fullmatch(path.name)) for path in self._entries()]
        return [path for path, match in matches if match and (self.root / match.group(1)).exists()]

    def _clear_leftovers(self) -> None:
        for path in self._entries():
            if TEMPORARY_NAME.fullmatch(path.name) and path not in self._writing:
                shutil.rmtree(path, ignore_errors=True)
        retired = [path for path in self._entries() if RETIRED_NAME.fullmatch(path.name)]
        self._deleter.delete([*self._replaced(), *retired])

    def _hide_and_delete(self, directories: Sequence[Path]) -> None:
        """Rename first: it hides in one step, and a later save of the same step cannot be hit by the deletion."""
        hidden = []
        for directory in directories:
            with suppress(OSError):
                hidden.append(directory.rename(directory.with_name(_retired_name(directory))))
        self._deleter.delete(hidden)


def _step_name(step: int) -> str:
    return f"step_{step:08d}"


def _retired_name(directory: Path) -> str:
    return f"{directory.name.partition('.')[0]}.deleted-{secrets.token_hex(8)}"


def _is_complete(path: Path) -> bool:
    try:
        verify_checkpoint(path, checksums=False)
    except CheckpointError:
        return False
    return True


def _loaded(path: Path, manifest: Manifest, skipped: Sequence[tuple[int, str]] = ()) -> LoadedCheckpoint:
    files = tuple(record.name for record in manifest.files)
    return LoadedCheckpoint(manifest.step, path, manifest.metadata, files, tuple(skipped))
