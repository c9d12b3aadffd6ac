"""Runs a function over many tasks in several processes."""

import multiprocessing
import os
import pickle
import queue
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Any, Generic, TypeVar, cast

from data.errors import DataError

# Tasks drawn ahead of the oldest unfinished one, per worker; bounds memory when one task is slow.
TASKS_AHEAD = 4

Task = TypeVar("Task")
Result = TypeVar("Result")


class WorkerPool(Generic[Task, Result]):
    """A context manager that owns worker processes; they end with it, and also when this process is killed.

    The results do not depend on the number of workers. One worker means this process itself.
    """

    def __init__(self, initialize: Callable[[], Callable[[Task], Result]], workers: int, in_hand: int = 2) -> None:
        """Prepares the pool; processes start on entering.

        Args:
            initialize: Called once in each worker; gives the function that turns a task into its result. It, the
                tasks and the results can be pickled.
            workers: Number of processes, at least 1.
            in_hand: Tasks that a worker has at once. With 2 it never waits for the next; with 1 no task waits
                behind another one while some worker is idle, which suits few long tasks.
        """
        self._initialize = initialize
        self._workers = workers
        self._in_hand = in_hand
        self._function: Callable[[Task], Result] | None = None
        self._processes: list[SpawnProcess] = []
        self._connections: list[Connection[Any, Any]] = []

    def __enter__(self) -> "WorkerPool[Task, Result]":
        """Starts the processes."""
        if self._workers == 1:
            self._function = self._initialize()
            return self
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
                process = context.Process(target=_serve, args=(theirs, self._initialize), daemon=True)
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

    def map(self, tasks: Iterable[Task], ordered: bool = True) -> Iterator[Result]:
        """Runs the function over tasks, which are drawn as workers get free.

        Args:
            tasks: What to do.
            ordered: Whether results come in the order of the tasks, or as they are ready.

        Yields:
            The result of each task.

        Raises:
            DataError: A worker died.
            Exception: Whatever the function raised.
        """
        if self._function is None:
            yield from self._map_in_workers(tasks, ordered)
        else:
            for task in tasks:
                yield self._function(task)

    def _map_in_workers(self, tasks: Iterable[Task], ordered: bool) -> Iterator[Result]:
        numbered = enumerate(tasks)
        finished: dict[int, Result] = {}
        in_hand: dict[Connection[Any, Any], list[int]] = {connection: [] for connection in self._connections}
        oldest, drawn = 0, 0
        while True:
            while drawn - oldest < TASKS_AHEAD * self._workers:
                connection = min(in_hand, key=lambda connection: len(in_hand[connection]))
                if len(in_hand[connection]) == self._in_hand or (item := next(numbered, None)) is None:
                    break
                number, task = item
                drawn += 1
                _send(connection, task)
                in_hand[connection].append(number)
            number = oldest if ordered else next(iter(finished), -1)
            if number in finished:
                yield finished.pop(number)
                oldest += 1
            elif busy := [connection for connection, numbers in in_hand.items() if numbers]:
                for ready in cast("list[Connection[Any, Any]]", wait(busy)):
                    finished[in_hand[ready].pop(0)] = _receive(ready)
            else:
                return


def _serve(connection: "Connection[Any, Any]", initialize: Callable[[], Callable[[Any], Any]]) -> None:
    """Runs in a worker until the other end of the pipe closes, also by the death of its process."""
    tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
    # A thread that always takes what comes: otherwise both sides could block on a full pipe.
    threading.Thread(target=_receive_tasks, args=(connection, tasks), daemon=True).start()
    function: Callable[[Any], Any] | None = None
    while True:
        task = tasks.get()
        try:
            function = function or initialize()
            result = function(task)
        except Exception as error:
            result = _Failure(_portable(error))
        try:
            connection.send(result)
        except OSError:
            return


class _Failure:
    """An exception on its way to the other process."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def _portable(error: Exception) -> Exception:
    """The error, or if it cannot travel to another process, one with its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _receive_tasks(connection: "Connection[Any, Any]", tasks: "queue.SimpleQueue[Any]") -> None:
    try:
        while True:
            tasks.put(connection.recv())
    except (EOFError, OSError):
        os._exit(0)  # Nobody waits for the result of the task at hand any more.


def _send(connection: "Connection[Any, Any]", task: object) -> None:
    try:
        connection.send(task)
    except OSError:
        raise _worker_died() from None


def _receive(connection: "Connection[Any, Any]") -> Any:
    try:
        result = connection.recv()
    except (EOFError, OSError):
        raise _worker_died() from None
    if isinstance(result, _Failure):
        raise result.error
    return result


def _worker_died() -> DataError:
    return DataError("a worker was killed, most likely for lack of memory; run again with fewer --workers")
