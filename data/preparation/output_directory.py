"""An output directory that appears under its name only when it is complete, and is made only once."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import pydantic

from data.errors import DataError
from data.files import fsync_path, write_atomically
from data.manifest import read_manifest
from data.preparation.inputs import RECORD_NAME
from data.preparation.requests import Record, Request
from data.shards import check_sizes

RecordType = TypeVar("RecordType", bound=Record)


class EmptySplitError(DataError):
    """A split got no document, so that the shards of the others are of no use to any other request."""


@dataclass(frozen=True)
class OutputDirectory(Generic[RecordType]):
    """A directory to make.

    Attributes:
        path: Where, as given by `resolve_output`.
        request: What was asked for.
        record_type: Class of the content of its `preparation.json`.
    """

    path: Path
    request: Request
    record_type: type[RecordType]

    @property
    def partial(self) -> Path:
        """The directory that holds everything until the output is complete."""
        return partial_path(self.path)

    @property
    def built(self) -> Path:
        """What becomes the output."""
        return self.partial / "output"

    def existing(self) -> RecordType | None:
        """Looks for an output that an earlier run has made.

        Returns:
            Its record, or nothing if the directory is empty or does not exist.

        Raises:
            DataError: It holds something else, or is damaged.
        """
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return None
        record = _read_record(self.path, self.record_type)
        if record is None:
            raise DataError(f"output {self.path} exists and was not made by this command; give another --output")
        if not record.request.is_continued_by(self.request):
            raise DataError(
                f"output {self.path} was made from something else ({record.request.differences(self.request)} differ); "
                "give another --output, or delete it first"
            )
        for split in self.request.splits:
            check_sizes(self.path / split, read_manifest(self.path / split))
        return record

    def make(self, build: Callable[[], RecordType]) -> tuple[RecordType, bool]:
        """Makes the output, unless it exists.

        Args:
            build: Fills `built`, going on from the finished shards there; gives the record.

        Returns:
            The record, and whether the output was there already.

        Raises:
            DataError: The output is something else, is being made by another process, or was begun with another
                request; or whatever `build` raises. Finished shards stay.
        """
        if (existing := self.existing()) is not None:
            self._remove_leftover()
            return existing, True
        with locked_directory(self.partial):
            # Another process may have finished it in the meantime.
            record = existing = self.existing()
            if record is None:
                self._keep_only_same_request()
                record = self._build(build)
                _publish(self.built, self.path)
            shutil.rmtree(self.partial)
        return record, existing is not None

    def _build(self, build: Callable[[], RecordType]) -> RecordType:
        try:
            record = build()
            write_atomically(self.built / RECORD_NAME, record.model_dump_json(indent=1).encode())
            return record
        except BaseException as error:
            if isinstance(error, EmptySplitError) or not self._finished_shards():
                shutil.rmtree(self.partial)  # Nothing in it is worth keeping.
            raise

    def _finished_shards(self) -> int:
        return sum(1 for _ in self.partial.glob("*/*/*.tar"))

    def _keep_only_same_request(self) -> None:
        record = _read_record(self.partial, self.record_type)
        if record is None or not record.request.is_continued_by(self.request):
            if shards := self._finished_shards():
                differ = f"{record.request.differences(self.request)} differ" if record else "by another command"
                raise DataError(
                    f"{self.partial} holds {shards:,} finished shards that were made otherwise ({differ}); give the "
                    f"same options and inputs again, or delete {self.partial}"
                )
            for child in self.partial.iterdir():
                shutil.rmtree(child) if child.is_dir() else child.unlink()
        if record is None or record.request != self.request:
            content = self.record_type(request=self.request).model_dump_json(indent=1)
            write_atomically(self.partial / RECORD_NAME, content.encode())

    def _remove_leftover(self) -> None:
        """Deletes what a run leaves that is killed after it has given the output its name."""
        if not self.partial.exists() or self.built.exists():
            return
        # If it fails, it does no harm; that other process will do it.
        with contextlib.suppress(DataError, OSError), locked_directory(self.partial):
            shutil.rmtree(self.partial)


def resolve_output(path: Path) -> Path:
    """Follows an output that is a link.

    Args:
        path: The output as the user names it.

    Returns:
        Where the directory is to be; has a name, and is no link.

    Raises:
        DataError: There is no such place.
    """
    resolved = path.absolute()
    if resolved.is_symlink() or resolved.name == "..":
        resolved = Path(os.path.realpath(resolved))
    if resolved.is_symlink():
        raise DataError(f"output {path} is a link that leads back to itself; give another --output")
    if not resolved.name:
        raise DataError(f"output {path} is the root of the file system; give a directory in it as --output")
    return resolved


def partial_path(output: Path) -> Path:
    """Names the directory beside an output that holds everything until the output is complete.

    Args:
        output: As given by `resolve_output`.
    """
    return output.with_name(f".{output.name}.partial")


@contextlib.contextmanager
def locked_directory(path: Path) -> Iterator[None]:
    """Makes a directory and keeps other preparations of the same output out of it.

    Args:
        path: The directory.

    Raises:
        DataError: Another process has it.
    """
    descriptor = None
    while descriptor is None:
        path.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(path)
    try:
        yield
    finally:
        os.close(descriptor)


def _lock(path: Path) -> int | None:
    """Opens and locks a directory; none if the one who had the lock has just deleted it."""
    with contextlib.ExitStack() as stack, contextlib.suppress(FileNotFoundError):
        descriptor = os.open(path, os.O_RDONLY)
        stack.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another process is preparing this output in {path}; wait for it or end it") from None
        except OSError:
            pass  # A file system without such locks: the user must not start the same preparation twice.
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            stack.pop_all()
            return descriptor
    return None


def _publish(built: Path, output: Path) -> None:
    try:
        os.rename(built, output)
    except OSError as error:
        raise DataError(f"output {output} cannot be made ({error.strerror}); the shards are in {built}") from None
    fsync_path(output.parent)


def _read_record(directory: Path, record_type: type[RecordType]) -> RecordType | None:
    try:
        return record_type.model_validate_json((directory / RECORD_NAME).read_bytes())
    except (OSError, pydantic.ValidationError):
        return None
