"""A save is stopped at every point; what was published before must survive, and the next save must work."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpoints.errors import CheckpointError
from checkpoints.store import CheckpointStore
from tests.checkpoints.saving import assert_holds, save

ROOT = Path(__file__).resolve().parents[2]
WATCHED = frozenset({"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"})


class Killed(BaseException):
    """Ends the save like SIGKILL would: nothing handles it."""


class Interrupter:
    """Raises at the n-th file operation of this thread below a directory."""

    def __init__(self) -> None:
        self.remaining = 0
        self.fired = False
        self.root = ""
        self.make_error: Callable[[], BaseException] = Killed
        self.thread = threading.get_ident()
        self.sync = os.fsync

    def arm(self, root: Path, position: int, make_error: Callable[[], BaseException]) -> None:
        self.root, self.remaining, self.make_error, self.fired = str(root), position, make_error, False

    def disarm(self) -> None:
        self.remaining = 0

    def count(self) -> None:
        if self.remaining and threading.get_ident() == self.thread:
            self.remaining -= 1
            if self.remaining == 0:
                self.fired = True
                raise self.make_error()

    def on_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.remaining and event in WATCHED and str(arguments[0]).startswith(self.root):
            self.count()

    def on_sync(self, descriptor: int) -> None:
        self.count()
        self.sync(descriptor)


@pytest.fixture(scope="module")
def interrupter() -> Interrupter:
    # An audit hook cannot be taken out again; without an armed position it does nothing.
    result = Interrupter()
    sys.addaudithook(result.on_event)
    return result


def input_output_error() -> OSError:
    return OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize("make_error", [Killed, input_output_error])
@pytest.mark.parametrize("step", [2, 3], ids=["replaces a step", "new step"])
@pytest.mark.parametrize("existing", [(), (1, 2)], ids=["first save", "later save"])
def test_a_complete_checkpoint_survives_a_stop_anywhere(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    interrupter: Interrupter,
    existing: tuple[int, ...],
    step: int,
    make_error: Callable[[], BaseException],
) -> None:
    monkeypatch.setattr(os, "fsync", interrupter.on_sync)
    original = tmp_path / "original"
    original.mkdir()
    for number in existing:
        save(CheckpointStore(original), number)
    position, fired = 0, True
    while fired:
        position += 1
        root = tmp_path / f"stopped_{position}"
        shutil.copytree(original, root)
        interrupter.arm(root, position, make_error)
        try:
            save(CheckpointStore(root), step)
        except (Killed, CheckpointError):
            assert interrupter.fired
        finally:
            interrupter.disarm()
        fired = interrupter.fired
        check_survivor(root, existing, step)
        shutil.rmtree(root)
    assert position > 15


def check_survivor(root: Path, existing: tuple[int, ...], step: int) -> None:
    loaded = CheckpointStore(root).newest()
    assert loaded is not None or not existing
    if loaded is not None:
        assert loaded.step in {max(existing, default=step), step}
        assert_holds(loaded.path, loaded.step)
    store = CheckpointStore(root)
    assert_holds(save(store, step + 1), step + 1)
    store.wait()
    assert not [path for path in root.iterdir() if "tmp-" in path.name]


@pytest.mark.parametrize("position", [1, 2])
def test_a_kill_between_the_renames_of_a_replacement_loses_nothing(
    tmp_path: Path, interrupter: Interrupter, position: int
) -> None:
    """The only checkpoint is replaced and the save dies before or after it was set aside."""
    save(CheckpointStore(tmp_path), 1)
    store = CheckpointStore(tmp_path)
    renames = []

    def stop_at_rename(event: str, arguments: tuple[Any, ...]) -> None:
        if armed and event == "os.rename" and str(arguments[0]).startswith(str(tmp_path)):
            renames.append(arguments)
            if len(renames) == position:
                raise Killed

    armed = True
    sys.addaudithook(stop_at_rename)
    with pytest.raises(Killed):
        save(store, 1)
    armed = False
    names = [path.name for path in tmp_path.iterdir()]
    assert ("step_00000001" in names) == (position == 1)
    loaded = CheckpointStore(tmp_path).newest()
    assert loaded is not None
    assert_holds(loaded.path, 1)


def test_sigkill_at_random_times(tmp_path: Path) -> None:
    """A real process saves without pause and is killed 30 times; each time the store is checked."""
    command = [sys.executable, "-m", "tests.checkpoints.kill_loop", str(tmp_path), "30"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    outcome = json.loads(result.stdout)
    assert outcome["kills"] == 30
    assert outcome["published"] > 1
    assert outcome["unfinished_saves"] > 0
