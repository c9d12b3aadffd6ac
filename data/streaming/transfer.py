"""Transfers from elsewhere through webdataset's openers: attempts, stalls, and what went wrong in words."""

import atexit
import os
import random
import select
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar
from urllib.parse import urlunsplit

from data.errors import DataError, MissingFileError
from data.locations import split_url

Result = TypeVar("Result")
CHUNK_BYTES = 2**20
LONGEST_WAIT_SECONDS = 60.0
# webdataset lets curl repeat a busy server's answer (429, 503, ...) 30 times after 2 s; an HTTP error that comes sooner
# is final.
CURL_RETRY_SECONDS = 60.0
COMMAND_NOT_FOUND = 127
CURL_HTTP_ERROR = 22
CURL_REASONS = {
    3: "the URL is malformed",
    6: "the host's name cannot be resolved",
    7: "the host refuses the connection",
    18: "the connection was cut in mid-file",
    CURL_HTTP_ERROR: "the server answers with an HTTP error, such as 404 for a file that is not there",
    28: "the connection timed out",
    35: "no secure connection could be made",
    52: "the server sent nothing",
    56: "the connection was cut",
    60: "the server's certificate is not trusted",
}
PROGRAMS = {"http": "curl", "https": "curl", "s3": "aws", "gs": "gsutil"}
FILE_PLACE = "{file}"


class TransferError(Exception):
    """One attempt failed; others may succeed.

    Attributes:
        refused: Whether the other side answered that it will not give the file, rather than broke off.
    """

    def __init__(self, reason: str, *, refused: bool = False) -> None:
        super().__init__(reason)
        self.refused = refused


class Fetcher:
    """Fetches files of one location; safe to use from several threads.

    Attributes:
        shown: The location without passwords and signatures, for messages.
        tells_missing: Whether a refusal says for certain that there is no such file.
    """

    def __init__(self, location: str, *, attempts: int, stall_seconds: float, first_wait_seconds: float = 1.0) -> None:
        """Checks the location; connects to nothing.

        Args:
            location: URL of a folder, or `pipe:` and a command with {file} in it.
            attempts: Attempts for each file.
            stall_seconds: A transfer that brings no byte for this long is broken off.
            first_wait_seconds: Pause after the first failed attempt; doubles with each.

        Raises:
            DataError: The URL is malformed, nothing can fetch from there, or the program that could is not installed.
        """
        self._location = location
        self._attempts = attempts
        self._stall_seconds = stall_seconds
        self._first_wait_seconds = first_wait_seconds
        self._scheme = location.partition(":")[0]
        self.shown = _without_secrets(location)
        self.tells_missing = PROGRAMS.get(self._scheme) == "curl"
        self._check()

    def _check(self) -> None:
        if self._scheme == "pipe":
            if FILE_PLACE not in self._location:
                raise DataError(
                    f"the command of {self.shown} does not say where the file's name goes; write {FILE_PLACE} there, "
                    f"as in pipe:ssh host cat /corpus/{FILE_PLACE}"
                )
            return
        if self._scheme not in PROGRAMS:
            known = ", ".join(f"{scheme}://" for scheme in PROGRAMS)
            raise DataError(f"{self.shown} cannot be fetched: known are {known} and pipe:; use one, or copy the corpus")
        if shutil.which(PROGRAMS[self._scheme]) is None:
            raise self._not_installed()

    def _not_installed(self) -> DataError:
        program = PROGRAMS[self._scheme]
        return DataError(f"{self.shown} needs the program {program}, which is not installed here; install {program}")

    def fetch(
        self, name: str, take: Callable[[Iterator[bytes]], Result], *, expected: bool, attempts: int | None = None
    ) -> Result:
        """Fetches a file, again after failures, with growing pauses.

        Args:
            name: Path inside the location.
            take: Reads the content; called anew in each attempt; may raise `TransferError` if the content is wrong.
            expected: Whether the file is known to be there, so that a refusal is no answer either.
            attempts: Instead of the usual number.

        Returns:
            What `take` returned.

        Raises:
            MissingFileError: It was refused.
            DataError: It could not be fetched.
        """
        attempts = attempts or self._attempts
        for attempt in range(1, attempts + 1):
            if _exiting.is_set():
                raise DataError(f"{name} is not fetched from {self.shown} any more, because this process ends")
            try:
                with self._open(name) as chunks:
                    return take(chunks)
            except TransferError as error:
                if _exiting.is_set():
                    continue
                answered = error.refused and self.tells_missing and not expected
                if attempt == attempts or answered:
                    raise self._failure(name, error, attempt) from None
                self._wait(name, error, attempt, attempts)
        raise AssertionError("unreachable")

    def _failure(self, name: str, error: TransferError, attempt: int) -> DataError:
        kind = MissingFileError if error.refused else DataError
        tried = "1 attempt" if attempt == 1 else f"{attempt} attempts"
        return kind(
            f"{name} cannot be fetched from {self.shown}: {error} ({tried}); check data.path and the other side, or "
            "raise data.cache.attempts"
        )

    def _wait(self, name: str, error: TransferError, attempt: int, attempts: int) -> None:
        seconds = min(self._first_wait_seconds * 2 ** (attempt - 1), LONGEST_WAIT_SECONDS)
        # Processes that failed together shall not come again together.
        seconds *= random.uniform(1.0, 1.25)
        message = f"fetching {name} from {self.shown}: {error}; attempt {attempt + 1} of {attempts} in {seconds:.1f} s"
        print(message, file=sys.stderr, flush=True)
        _exiting.wait(seconds)

    @contextmanager
    def _open(self, name: str) -> Iterator[Iterator[bytes]]:
        # Imported here because webdataset imports torch, which a corpus on this machine can be read without.
        from webdataset.gopen import gopen, set_options

        try:
            pipe = gopen(self._opener_url(name), "rb", CHUNK_BYTES)
        except FileNotFoundError:
            raise self._not_installed() from None
        except (OSError, ValueError) as error:
            raise DataError(f"{name} cannot be fetched from {self.shown}: {error}; check data.path") from None
        # The status is judged here; webdataset would take some failures for an end of the reader's own making.
        set_options(pipe, ignore_errors=True)
        _running.add(pipe)
        try:
            yield self._chunks(name, pipe)
        finally:
            _end(pipe)
            _running.discard(pipe)

    def _opener_url(self, name: str) -> str:
        """What webdataset opens. A command leads a session of its own, so that it can be ended with its children."""
        if self._scheme == "pipe":
            command = self._location.removeprefix("pipe:").replace(FILE_PLACE, shlex.quote(name))
            return f"pipe:exec setsid sh -c {shlex.quote(command)}"
        if self._scheme == "s3":  # webdataset has no opener of its own for it.
            url = shlex.quote(f"{self._location.rstrip('/')}/{name}")
            return f"pipe:exec setsid aws s3 cp --only-show-errors {url} -"
        if self._scheme == "gs":
            return f"{self._location.rstrip('/')}/{name}"
        parts = split_url(self._location)  # A signature stands behind the path.
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))

    def _chunks(self, name: str, pipe: Any) -> Iterator[bytes]:
        begin = time.monotonic()
        descriptor = pipe.stream.fileno()
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        while True:
            if not poll.poll(self._stall_seconds * 1000):
                raise TransferError(f"no byte came for {self._stall_seconds:g} s")
            # Past the stream's buffer, which would wait until it is full.
            chunk = os.read(descriptor, CHUNK_BYTES)
            if not chunk:
                break
            yield chunk
        try:
            status = pipe.proc.wait(self._stall_seconds)
        except subprocess.TimeoutExpired:
            raise TransferError(f"the transfer did not end for {self._stall_seconds:g} s after its last byte") from None
        self._check_status(name, status, time.monotonic() - begin)

    def _check_status(self, name: str, status: int, seconds: float) -> None:
        if status == 0:
            return
        if self._scheme == "pipe" and status == COMMAND_NOT_FOUND:
            raise DataError(
                f"{name} cannot be fetched from {self.shown}: a program of this command is not installed here "
                f"(status {status}); install it or correct data.path"
            )
        if not self.tells_missing:
            program = PROGRAMS.get(self._scheme, "the command")
            raise TransferError(f"{program} ended with {_status_in_words(status)}", refused=status > 0)
        reason = CURL_REASONS.get(status, "the transfer failed")
        refused = status == CURL_HTTP_ERROR and seconds < CURL_RETRY_SECONDS
        raise TransferError(f"{reason} (curl ended with {_status_in_words(status)})", refused=refused)


_running: set[Any] = set()
_exiting = threading.Event()


def _end(pipe: Any) -> None:
    """Ends a transfer, also in the middle, with all processes that belong to it."""
    if pipe.proc.returncode is None:
        _kill(pipe.proc)
    with suppress(OSError):
        pipe.close()


def _kill(process: "subprocess.Popen[bytes]") -> None:
    # Nobody has waited for the process, so its number is still its own. It may not lead its session yet, or never.
    with suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def _end_all() -> None:
    _exiting.set()
    for pipe in tuple(_running):
        _kill(pipe.proc)


atexit.register(_end_all)
# A child must not end its parent's transfers when it exits.
os.register_at_fork(after_in_child=_running.clear)


def _status_in_words(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"status {status}"


def _without_secrets(location: str) -> str:
    if location.startswith("pipe:") or "://" not in location:
        return location
    parts = split_url(location)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))
