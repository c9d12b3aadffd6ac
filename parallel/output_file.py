"""Files named by --output that appear whole or not at all."""

from contextlib import suppress
from pathlib import Path

from parallel.errors import ConfigurationError


def check_output_file(path: Path) -> None:
    """Finds out, before the work whose result it is to hold, whether a file can be written.

    Raises:
        ConfigurationError: It cannot.
    """
    unfinished = _unfinished(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "Is a directory")
        unfinished.touch()
        unfinished.unlink()
    except OSError as error:
        raise _cannot_be_written(path, error) from None


def write_output_file(path: Path, text: str) -> None:
    """Writes a file beside its place, then puts it there.

    Raises:
        ConfigurationError: It cannot be written; what was there before still is.
    """
    unfinished = _unfinished(path)
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        with suppress(OSError):
            unfinished.unlink()
        raise _cannot_be_written(path, error) from None


def _unfinished(path: Path) -> Path:
    return path.with_name(f"{path.name}.new")


def _cannot_be_written(path: Path, error: OSError) -> ConfigurationError:
    return ConfigurationError(f"--output: {path} cannot be written ({error.strerror}); name another place")
