"""Files named by --output that appear whole or not at all."""

import os
from pathlib import Path

from data.files import write_atomically
from parallel.errors import ConfigurationError


def check_output_file(path: Path) -> None:
    """Finds out, before the work whose result it is to hold, whether a file can be written.

    Raises:
        ConfigurationError: It cannot.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "Is a directory")
        if not _is_device(path):
            place = path.resolve()
            attempt = place.with_name(f".{place.name}.{os.getpid()}.attempt")
            write_atomically(attempt, b"")
            attempt.unlink()
    except OSError as error:
        raise _cannot_be_written(path, error) from None


def write_output_file(path: Path, text: str) -> None:
    """Writes a file beside its place, then puts it there.

    Raises:
        ConfigurationError: It cannot be written; what was there before still is.
    """
    try:
        if _is_device(path):
            path.write_text(text, encoding="utf-8")
        else:
            write_atomically(path.resolve(), text.encode())
    except OSError as error:
        raise _cannot_be_written(path, error) from None


def _is_device(path: Path) -> bool:
    """Whether it is something like /dev/stdout, which no file can take the place of."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _cannot_be_written(path: Path, error: OSError) -> ConfigurationError:
    return ConfigurationError(f"--output: {path} cannot be written ({error.strerror}); name another place")
