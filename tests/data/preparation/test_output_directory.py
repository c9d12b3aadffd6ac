import gc
import os
import shutil
from pathlib import Path

import pytest

from data.errors import DataError
from data.preparation import output_directory
from data.preparation.output_directory import locked_directory


def test_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder"
    with (
        locked_directory(path),
        pytest.raises(DataError, match=r"another process is preparing this output in .*folder; wait"),
        locked_directory(path),
    ):
        pass
    with locked_directory(path):
        assert path.is_dir()


def test_a_directory_deleted_before_it_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one who has the lock deletes the directory between another's opening and locking it, or makes it anew."""
    path = tmp_path / "folder"
    lock = output_directory.fcntl.flock
    fates = [False, True]

    def delete_and_lock(descriptor: int, operation: int) -> None:
        if fates:
            shutil.rmtree(path)
            if fates.pop():
                path.mkdir()
        lock(descriptor, operation)

    monkeypatch.setattr(output_directory.fcntl, "flock", delete_and_lock)
    gc.collect()  # What earlier tests left open must not be closed in between.
    opened = len(os.listdir("/proc/self/fd"))
    with locked_directory(path):
        assert not fates
        with pytest.raises(DataError, match="another process"), locked_directory(path):
            pass
    assert len(os.listdir("/proc/self/fd")) == opened
