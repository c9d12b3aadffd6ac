import functools
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data.preparation.workers import TASKS_AHEAD, WorkerPool


def squarer(slow: int, later: Path) -> Callable[[int], int]:
    """One task waits until the other worker has done one that is given out when later results have come."""

    def square(task: int) -> int:
        while task == slow and not later.exists():
            time.sleep(0.01)
        if task >= slow + 4:
            later.touch()
        if task < 0:
            raise ValueError(f"task {task} is negative")
        return task * task

    return square


class _StubbornError(Exception):
    """Takes more arguments than it passes on, so that it can be pickled but not read."""

    def __init__(self, task: int, reason: str) -> None:
        super().__init__(f"task {task}: {reason}")


def failing() -> Callable[[int], int]:
    def fail(task: int) -> int:
        if task:
            raise _StubbornError(task, "broken")
        error = ValueError("a lock in it")
        error.lock = threading.Lock()  # type: ignore[attr-defined]
        raise error

    return fail


def sizes(task: bytes) -> tuple[int, bytes]:
    return os.getpid(), task


def echo() -> Callable[[bytes], tuple[int, bytes]]:
    return sizes


@pytest.mark.slow
def test_order_lookahead_and_errors(tmp_path: Path) -> None:
    drawn = 0

    def tasks(numbers: range) -> Iterator[int]:
        nonlocal drawn
        for number in numbers:
            drawn += 1
            yield number

    later = tmp_path / "later"
    with WorkerPool(functools.partial(squarer, 3, later), 2) as pool:
        for position, result in enumerate(pool.map(tasks(range(50)))):
            assert result == position**2
            assert drawn <= position + 1 + 2 * TASKS_AHEAD
        later.unlink()
        unordered = list(pool.map(range(20), ordered=False))
        assert sorted(unordered) == [number**2 for number in range(20)]
        assert unordered[3] != 9
        with pytest.raises(ValueError, match="task -1 is negative"):
            list(pool.map([1, 2, -1, 3]))


@pytest.mark.slow
@pytest.mark.parametrize(("task", "message"), [(0, "ValueError: a lock in it"), (7, "_StubbornError: task 7: broken")])
def test_an_error_that_cannot_be_pickled_keeps_its_text(task: int, message: str) -> None:
    with WorkerPool(failing, 2) as pool, pytest.raises(RuntimeError, match=message):
        list(pool.map([task]))


@pytest.mark.slow
def test_tasks_and_results_larger_than_any_pipe() -> None:
    """Both sides send megabytes at once, which must not block them."""
    task = bytes(3 << 20)
    with WorkerPool(echo, 2) as pool:
        results = list(pool.map([task] * 12))
    assert all(result == task for _, result in results)
    assert len({process for process, _ in results}) == 2
    assert os.getpid() not in {process for process, _ in results}


def test_one_worker_is_this_process() -> None:
    with WorkerPool(echo, 1) as pool:
        assert list(pool.map([b"a"])) == [(os.getpid(), b"a")]
