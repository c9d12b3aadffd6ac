"""What all command-line tools share: how they end, and how they tell a user what went wrong."""

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from parallel.errors import ConfigurationError

USER_ERROR_STATUS = 2
INTERRUPTED_STATUS = 130
TERMINATED_STATUS = 143


def run(main: Callable[[], int | None], *user_errors: type[Exception]) -> NoReturn:
    """Runs a tool and ends the process; a user's mistake gives one line and status 2 instead of a traceback.

    Args:
        main: The tool; returns the exit status, None for 0.
        *user_errors: Error classes whose message is meant for the user.
    """
    with _noted_interruption() as interrupted:
        try:
            status = main()
        except (Exception, KeyboardInterrupt) as error:
            # A library may have made another error of Ctrl-C.
            if interrupted or isinstance(error, KeyboardInterrupt):
                print("interrupted", file=sys.stderr)
                status = INTERRUPTED_STATUS
            elif isinstance(error, user_errors):
                print(f"error: {error}", file=sys.stderr)
                status = USER_ERROR_STATUS
            else:
                raise
    sys.exit(status)


@contextmanager
def _noted_interruption() -> Iterator[list[int]]:
    """Ctrl-C raises KeyboardInterrupt as ever, and is in the list from then on."""
    noted: list[int] = []
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        signal.default_int_handler(number, frame)

    if before is not signal.default_int_handler:  # a caller wants it otherwise
        yield noted
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def positive(text: str) -> int:
    """A number of the command line that must be at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 1")
    return int(text)


def make_output_folder(path: Path) -> None:
    """Makes the folder of --output.

    Raises:
        ConfigurationError: It cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"--output {path} cannot be made: {error.strerror}; name another folder") from None


def exit_on_termination() -> None:
    """Makes SIGTERM end this process like an exception, so that everything opened is closed and cleaned up."""

    def handle(signal_number: int, frame: FrameType | None) -> NoReturn:
        sys.exit(TERMINATED_STATUS)

    signal.signal(signal.SIGTERM, handle)
