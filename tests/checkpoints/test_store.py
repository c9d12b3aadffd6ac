import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoints.errors import CheckpointError
from checkpoints.records import FileRecord
from checkpoints.store import CheckpointStore, verify_checkpoint
from tests.checkpoints.saving import assert_holds, save, write_rank

ROOT = Path(__file__).resolve().parents[2]


def test_an_empty_root_has_no_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "absent")
    assert store.newest() is None
    assert store.complete_steps() == []
    assert store.prune() == []


def test_a_save_is_invisible_until_published(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    temporary = store.begin(5)
    records = [write_rank(temporary, 5, rank) for rank in (0, 1)]
    assert store.newest() is None
    path = store.publish(5, temporary, records, {"consumed_sequences": 40})
    loaded = store.newest()
    assert loaded is not None
    assert (loaded.step, loaded.path, loaded.metadata, loaded.skipped) == (5, path, {"consumed_sequences": 40}, ())
    assert (tmp_path / "latest").read_text() == "step_00000005\n"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["latest", "step_00000005"]
    assert_holds(path, 5)


def test_a_rank_that_did_not_deliver_stops_the_publication(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    temporary = store.begin(2)
    records = [write_rank(temporary, 2, rank) for rank in (0, 1)]
    with pytest.raises(CheckpointError, match=r"rank_00007.safetensors is missing"):
        store.publish(2, temporary, [*records, FileRecord("rank_00007.safetensors", 1, "0")], {})
    temporary = store.begin(2)
    with pytest.raises(CheckpointError, match=r"rows \(2, 4\) of axis 0 of layer.weight"):
        store.publish(2, temporary, [write_rank(temporary, 2, 0)], {})
    assert not temporary.exists()
    assert store.complete_steps() == [1]


def test_metadata_must_be_json(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    temporary = store.begin(2)
    with pytest.raises(CheckpointError, match="metadata of step 2 is not JSON"):
        store.publish(2, temporary, [], {"path": tmp_path})


def flip_byte(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(bytes(content))


def damage(path: Path, how: str) -> None:
    victim = path / "rank_00001.safetensors"
    if how == "flipped byte":
        flip_byte(victim, -3)
    elif how == "truncated":
        victim.write_bytes(victim.read_bytes()[:-7])
    elif how == "deleted":
        victim.unlink()
    elif how == "no manifest":
        (path / "manifest.json").unlink()
    elif how == "cut manifest":
        manifest = path / "manifest.json"
        manifest.write_bytes(manifest.read_bytes()[:100])
    else:
        manifest = path / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"consumed_sequences": 24', '"consumed_sequences": 25'))


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("flipped byte", "rank_00001.safetensors is damaged: its checksum"),
        ("truncated", "rank_00001.safetensors has"),
        ("deleted", "rank_00001.safetensors is missing"),
        ("no manifest", "manifest.json is missing"),
        ("cut manifest", "manifest.json is unreadable"),
        ("changed metadata", "manifest.json is damaged"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_with_the_reason(tmp_path: Path, how: str, reason: str) -> None:
    store = CheckpointStore(tmp_path, keep_last=3)
    paths = {step: save(store, step) for step in (1, 2, 3)}
    damage(paths[3], how)
    with pytest.raises(CheckpointError, match=reason):
        verify_checkpoint(paths[3])
    loaded = CheckpointStore(tmp_path).newest()
    assert loaded is not None
    assert loaded.step == 2
    assert [step for step, _ in loaded.skipped] == [3]
    assert reason in loaded.skipped[0][1]
    assert_holds(loaded.path, 2)


def test_every_byte_of_a_checkpoint_is_guarded(tmp_path: Path) -> None:
    path = save(CheckpointStore(tmp_path), 3)
    for file in sorted(path.iterdir()):
        intact = file.read_bytes()
        for position in range(0, len(intact), 1 + len(intact) // 40):
            if intact[position : position + 1].isspace():
                continue
            flip_byte(file, position)
            with pytest.raises(CheckpointError):
                verify_checkpoint(path)
            file.write_bytes(intact)
    verify_checkpoint(path)


def test_a_flipped_byte_passes_only_without_checksums(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    damage(save(store, 1), "flipped byte")
    assert store.complete_steps() == [1]
    assert store.newest(verify=False) is not None


def test_damage_everywhere_is_an_error_and_not_a_fresh_start(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for path in [save(store, step) for step in (1, 2)]:
        damage(path, "deleted")
    with pytest.raises(CheckpointError, match=r"no checkpoint .* is usable .*step 2: .*step 1: "):
        store.newest()


def test_an_unknown_step_is_explained(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 4)
    assert store.at_step(4).step == 4
    with pytest.raises(CheckpointError, match="no checkpoint of step 5; complete steps: 4"):
        store.at_step(5)


def test_retention_keeps_the_newest_and_each_kth(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2, keep_every=4)
    for step in range(1, 12):
        save(store, step)
    assert store.complete_steps() == [4, 8, 10, 11]
    store.wait()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [
        f"step_{step:08d}" for step in (4, 8, 10, 11)
    ]


def test_retention_removes_older_broken_steps_and_leaves_newer_ones(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=9)
    paths = {step: save(store, step) for step in (1, 2, 3)}
    damage(paths[1], "no manifest")
    damage(paths[3], "deleted")
    assert store.prune() == [1]
    store.wait()
    assert not paths[1].exists()
    assert paths[3].exists()


def test_retention_never_takes_the_step_just_saved_after_a_fallback(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    for step in (1, 20, 30):
        save(CheckpointStore(tmp_path, keep_last=3), step)
    for step in (20, 30):
        damage(tmp_path / f"step_{step:08d}", "flipped byte")
    loaded = store.newest()
    assert loaded is not None
    assert loaded.step == 1
    save(store, 2)
    save(store, 3)
    assert {2, 3} <= set(store.complete_steps())
    resumed = CheckpointStore(tmp_path).newest()
    assert resumed is not None
    assert resumed.step == 3


def test_retention_keeps_the_step_just_saved_after_going_back(tmp_path: Path) -> None:
    for step in (1, 20, 30):
        save(CheckpointStore(tmp_path, keep_last=3), step)
    store = CheckpointStore(tmp_path, keep_last=2)
    save(store, 2)
    assert store.complete_steps() == [2, 20, 30]


def test_a_failing_deletion_does_not_stop_the_run(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=1)
    path = save(store, 1)
    if subprocess.run(["chattr", "+i", path / "rank_00000.safetensors"], capture_output=True).returncode:
        pytest.skip("this file system or user cannot make a file undeletable")
    try:
        save(store, 2)
        store.wait()
        assert store.complete_steps() == [2]
    finally:
        (stubborn,) = tmp_path.glob("step_00000001*/rank_00000.safetensors")
        subprocess.run(["chattr", "-i", stubborn], check=True)
    assert ".deleted-" in stubborn.parent.name
    store.begin(3)
    store.wait()
    assert not list(tmp_path.glob("step_00000001*"))


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    temporary = store.begin(1)
    store.publish(1, temporary, [write_rank(temporary, 9, rank) for rank in (0, 1)], {"again": True})
    store.wait()
    loaded = store.newest()
    assert loaded is not None
    assert loaded.metadata == {"again": True}
    assert_holds(loaded.path, 9)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["latest", "step_00000001"]


def test_begin_clears_leftovers_but_not_a_save_in_progress(tmp_path: Path) -> None:
    dead = CheckpointStore(tmp_path).begin(1)
    store = CheckpointStore(tmp_path)
    running = store.begin(2)
    assert not dead.exists()
    store.begin(3)
    assert running.exists()


@pytest.mark.parametrize("field", ["keep_last", "keep_every"])
def test_retention_numbers_are_checked(tmp_path: Path, field: str) -> None:
    with pytest.raises(CheckpointError, match=f"{field} is 0: set it to 1 or more"):
        CheckpointStore(tmp_path, **{field: 0})


def save_until_it_fails(store: CheckpointStore) -> None:
    for step in range(1, 1000):
        save(store, step)
        assert store.complete_steps()[-1] == step


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount_point = tmp_path / "disk"
    mount_point.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", mount_point]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs the right to mount")
    yield mount_point
    subprocess.run(["umount", "-l", mount_point], check=True)


def test_a_full_disk_is_explained_and_leaves_older_checkpoints(small_disk: Path) -> None:
    store = CheckpointStore(small_disk, keep_last=1000)
    with pytest.raises(CheckpointError) as caught:
        save_until_it_fails(store)
    saved = store.complete_steps()[-1]
    assert "No space left on device" in str(caught.value)
    assert "bytes free" in str(caught.value)
    assert "free space, raise the quota, or keep fewer checkpoints" in str(caught.value)
    loaded = CheckpointStore(small_disk).newest()
    assert loaded is not None
    assert loaded.step == saved
    assert_holds(loaded.path, saved)


def test_a_file_size_limit_is_explained_and_leaves_no_partial_file(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    temporary = store.begin(2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        with pytest.raises(CheckpointError, match=r"rank_00000.safetensors \(144 bytes needed, \d+ bytes free\)"):
            write_rank(temporary, 2, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(temporary.iterdir()) == []
    store.discard(temporary)
    loaded = store.newest()
    assert loaded is not None
    assert loaded.step == 1


def test_importing_the_store_loads_no_distributed_runtime() -> None:
    code = "import sys, checkpoints.store; print({'deepspeed', 'megatron', 'parallel'} & {*sys.modules})"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"
