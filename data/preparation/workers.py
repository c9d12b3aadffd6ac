"""Encodes batches of documents in several processes, in order."""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import TracebackType
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.tokenizer import Tokenizer, load_tokenizer

# Batches read ahead of the oldest unfinished one, per worker; bounds memory when one batch is slow.
BATCHES_AHEAD = 4


class TextBatch(Protocol):
    """Anything with texts to encode."""

    @property
    def texts(self) -> Sequence[str]:
        """The documents."""


Batch = TypeVar("Batch", bound=TextBatch)
Encoded = list[NDArray[np.uint32]]


class EncodingPool(Generic[Batch]):
    """A context manager that owns worker processes; they end with it, and also when this process is killed.

    The results do not depend on the number of workers. One worker means this process itself.
    """

    def __init__(self, tokenizer: Tokenizer, workers: int) -> None:
        """Prepares the pool; processes start on entering.

        Args:
            tokenizer: The tokenizer; each process loads it anew from its path.
            workers: Number of processes, at least 1.
        """
        self._tokenizer = tokenizer
        self._workers = workers
        self._processes: list[SpawnProcess] = []
        self._connections: list[Connection[Sequence[str], Encoded | Exception]] = []

    def __enter__(self) -> "EncodingPool[Batch]":
        """Starts the processes."""
        if self._workers > 1:
            try:
                self._start()
            except BaseException:
                self._stop()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Ends the processes."""
        self._stop()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        # Ctrl-C reaches the whole process group; workers inherit the blocked signal and end with this process instead.
        # The resource tracker comes first, because starting it unblocks the signal.
        resource_tracker.ensure_running()
        previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for _ in range(self._workers):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, self._tokenizer.path), daemon=True)
                self._connections.append(ours)
                process.start()
                self._processes.append(process)
                theirs.close()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, previous)

    def _stop(self) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()

    def encode(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Encoded]]:
        """Encodes batches.

        Args:
            batches: Batches of documents.

        Yields:
            Each batch with the token ids of its documents, in the order of the input.

        Raises:
            DataError: A worker died.
        """
        if self._workers == 1:
            for batch in batches:
                yield batch, encode_texts(self._tokenizer, batch.texts)
        else:
            yield from self._encode_in_workers(batches)

    def _encode_in_workers(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Encoded]]:
        numbered = enumerate(batches)
        waiting: dict[int, Batch] = {}
        finished: dict[int, Encoded] = {}
        busy: dict[Connection[Sequence[str], Encoded | Exception], int] = {}
        idle = list(self._connections)
        oldest = 0
        while True:
            # A worker gets its next batch only after its last result was taken, so neither side blocks on a full pipe.
            while idle and len(waiting) < BATCHES_AHEAD * self._workers and (item := next(numbered, None)):
                number, batch = item
                waiting[number] = batch
                connection = idle.pop()
                _send(connection, batch.texts)
                busy[connection] = number
            if oldest in finished:
                yield waiting.pop(oldest), finished.pop(oldest)
                oldest += 1
            elif busy:
                for ready in wait(list(busy)):
                    connection = next(other for other in busy if other is ready)
                    finished[busy.pop(connection)] = _receive(connection)
                    idle.append(connection)
            else:
                return


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> Encoded:
    """Encodes documents into arrays.

    Args:
        tokenizer: The tokenizer.
        texts: The documents.

    Returns:
        [tokens] ids of each document.
    """
    return [np.asarray(ids, dtype=np.uint32) for ids in tokenizer.encode_batch(texts)]


def _serve(connection: "Connection[Encoded | Exception, Sequence[str]]", tokenizer_path: Path) -> None:
    """Runs in a worker until the other end of the pipe closes, also by the death of its process."""
    # The workers are the parallelism; threads of the tokenizer library would only get in each other's way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with contextlib.suppress(EOFError, OSError):
        tokenizer = load_tokenizer(tokenizer_path)
        while True:
            texts = connection.recv()
            try:
                connection.send(encode_texts(tokenizer, texts))
            except Exception as error:
                connection.send(error)


def _send(connection: "Connection[Sequence[str], Encoded | Exception]", texts: Sequence[str]) -> None:
    try:
        connection.send(texts)
    except OSError:
        raise _worker_died() from None


def _receive(connection: "Connection[Sequence[str], Encoded | Exception]") -> Encoded:
    try:
        result = connection.recv()
    except (EOFError, OSError):
        raise _worker_died() from None
    if isinstance(result, Exception):
        raise result
    return result


def _worker_died() -> DataError:
    return DataError("a tokenizer worker was killed, most likely for lack of memory; run again with fewer --workers")
