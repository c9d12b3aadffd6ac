"""An output directory that appears under its name only when it is complete."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from data.errors import DataError
from data.files import fsync_path


@contextlib.contextmanager
def locked_directory(path: Path) -> Iterator[None]:
    """Makes a directory and keeps other preparations of the same output out of it.

    Args:
        path: The directory.

    Raises:
        DataError: Another process has it.
    """
    path.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another process is preparing this output in {path}; wait for it or end it") from None
        except OSError:
            pass  # A file system without such locks: the user must not start the same preparation twice.
        # The one who had the lock may just have deleted the directory.
        path.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        os.close(descriptor)


def publish(built: Path, output: Path) -> None:
    """Gives a complete directory its name.

    Args:
        built: The directory.
        output: Its name; may be an empty directory.

    Raises:
        DataError: The output has come into being meanwhile.
    """
    try:
        os.rename(built, output)
    except OSError as error:
        raise DataError(f"output {output} cannot be made ({error.strerror}); the shards are in {built}") from None
    fsync_path(output.parent)
