"""Copies in a second place: complete or not there, with the first place's retention, and back again."""

import threading
import time
from pathlib import Path

import pytest

from checkpoints.errors import CheckpointError
from checkpoints.records import MANIFEST
from checkpoints.second_level import BackgroundCopies, SecondLevel
from checkpoints.store import CheckpointStore
from tests.checkpoints.saving import assert_holds, save


@pytest.fixture(params=["folder", "url"])
def second_level(request: pytest.FixtureRequest, tmp_path: Path) -> SecondLevel:
    place = tmp_path / "second"
    return SecondLevel(str(place) if request.param == "folder" else f"file://{place}")


def test_copies_follow_the_retention_and_come_back(tmp_path: Path, second_level: SecondLevel) -> None:
    assert second_level.steps() == []
    assert second_level.fetch_newest(tmp_path / "elsewhere") is None
    store = CheckpointStore(tmp_path / "first", keep_last=2)
    copies = BackgroundCopies(second_level)
    for step in (1, 2, 3):
        copies.start(save(store, step), store)
        copies.wait()
    assert copies.problems() == []
    assert second_level.steps() == store.complete_steps() == [2, 3]
    fetched = copies.fetch_newest(tmp_path / "elsewhere")
    assert fetched is not None
    assert_holds(fetched, 3)
    assert CheckpointStore(tmp_path / "elsewhere").complete_steps() == [3]


def test_an_unfinished_or_damaged_copy_is_not_used(tmp_path: Path, second_level: SecondLevel) -> None:
    store = CheckpointStore(tmp_path / "first")
    for step in (1, 2):
        second_level.put(save(store, step), store.kept())
    (tmp_path / "second" / "step_00000002" / MANIFEST).unlink()
    assert second_level.steps() == [1]
    second_level.put(store.published()[2], store.kept())
    assert second_level.steps() == [1, 2], "a second attempt replaces what is left of the first"
    file = tmp_path / "second" / "step_00000002" / "rank_00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="its checksum does not match"):
        second_level.fetch_newest(tmp_path / "elsewhere")
    assert CheckpointStore(tmp_path / "elsewhere").newest() is None


def test_a_copy_takes_the_place_of_a_damaged_checkpoint(tmp_path: Path, second_level: SecondLevel) -> None:
    store = CheckpointStore(tmp_path / "first")
    second_level.put(save(store, 1), store.kept())
    (tmp_path / "first" / "step_00000001" / "rank_00000.safetensors").unlink()
    assert store.complete_steps() == []
    fetched = second_level.fetch_newest(tmp_path / "first")
    assert fetched is not None
    assert_holds(fetched, 1)
    assert store.complete_steps() == [1]


def test_what_goes_wrong_is_said_and_training_goes_on(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    copies = BackgroundCopies(SecondLevel(str(tmp_path / "file")))
    store = CheckpointStore(tmp_path / "first")
    copies.start(save(store, 1), store)
    copies.wait()
    (problem,) = copies.problems()
    assert problem.startswith("cannot copy ")
    assert copies.problems() == []
    with pytest.raises(CheckpointError, match=r"cannot list checkpoint\.copy_to="):
        SecondLevel(str(tmp_path / "file" / "run")).steps()
    with pytest.raises(CheckpointError, match="copy_to=nonsense://x cannot be opened"):
        SecondLevel("nonsense://x")


def test_the_newest_is_copied_also_when_copies_are_slower_than_saves(tmp_path: Path) -> None:
    second_level, may_go_on = SecondLevel(str(tmp_path / "second")), threading.Event()

    class SlowStore(CheckpointStore):
        def kept(self) -> list[int]:
            may_go_on.wait(30)
            return super().kept()

    store, copies = SlowStore(tmp_path / "first", keep_last=9), BackgroundCopies(second_level)
    for step in (1, 2, 3):
        copies.start(save(store, step), store)
        while step == 1 and copies._next is not None:
            time.sleep(0.01)
    may_go_on.set()
    copies.wait()
    assert second_level.steps() == [1, 3]
    (problem,) = copies.problems()
    assert problem.startswith("step_00000002 is not copied to ")


def test_a_checkpoint_stays_while_it_is_copied(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=1)
    save(store, 1)
    store.hold(1)
    save(store, 2)
    assert store.complete_steps() == [1, 2]
    store.release(1)
    save(store, 3)
    assert store.complete_steps() == [3]
