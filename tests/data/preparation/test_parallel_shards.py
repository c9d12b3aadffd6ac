import errno
import functools
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from data.errors import DataError
from data.manifest import ShardRecord
from data.preparation.parallel_shards import build_shards
from data.shards import ShardReader
from tests.data.builders import write_shard

TASKS = [10, 30, 20, 5]


def build(refused: dict[int, str], task: int, directory: Path, index: int) -> ShardRecord:
    """One document of `task` tokens, whose value is the index; or one of the ways in which this can go wrong."""
    fate = refused.get(index)
    if fate is not None:
        (directory / f".shard-{index:05d}.tar.tmp").write_bytes(b"unfinished")
    if fate == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fate == "disk full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))
    if fate == "interrupted":
        raise KeyboardInterrupt
    return write_shard(directory, [np.full(task, index, np.uint32)], index=index)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.slow
def test_the_result_does_not_depend_on_workers_or_interruptions(tmp_path: Path) -> None:
    """The second directory meets every misfortune, and each time goes on with what is finished."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    seen: list[int] = []
    shards = build_shards(
        whole, tmp_path / "a.jsonl", TASKS, functools.partial(build, {}), 1, lambda shard: seen.append(shard.tokens)
    )
    assert [shard.tokens for shard in shards] == seen == TASKS
    assert (ShardReader(whole / shards[2].file, shards[2], "uint16").read(0, 20) == 2).all()
    journal = tmp_path / "b.jsonl"
    for workers, refused, message in (
        (2, dict.fromkeys(range(4), "killed"), "a worker was killed, most likely for lack of memory"),
        (2, {3: "disk full"}, "No space left on device; finished shards are kept: free space"),
        (1, {3: "disk full"}, "No space left"),
    ):
        with pytest.raises(DataError, match=message):
            build_shards(broken, journal, TASKS, functools.partial(build, refused), workers)
        assert not list(broken.glob(".*"))
    with pytest.raises(KeyboardInterrupt):
        build_shards(broken, journal, TASKS, functools.partial(build, {3: "interrupted"}), 1)
    kept = {path.name: path.stat().st_mtime_ns for path in broken.iterdir()}
    assert {"shard-00000.tar", "shard-00001.tar", "shard-00002.tar"} <= set(kept)
    with open(journal, "ab") as file:
        file.write(b'{"index": 3, "sh')
    (broken / ".shard-00003.tar.tmp").write_bytes(b"left by a kill")
    again: list[int] = []
    repeated = build_shards(
        broken, journal, TASKS, functools.partial(build, {}), 2, lambda shard: again.append(shard.tokens)
    )
    assert repeated == shards
    assert sorted(again) == sorted(TASKS)
    assert contents(broken) == contents(whole)
    assert {name: (broken / name).stat().st_mtime_ns for name in kept} == kept


def test_a_finished_shard_that_was_cut_is_built_again(tmp_path: Path) -> None:
    function = functools.partial(build, {})
    build_shards(tmp_path / "shards", tmp_path / "journal", TASKS, function, 1)
    before = contents(tmp_path / "shards")
    os.truncate(tmp_path / "shards" / "shard-00001.tar", 100)
    build_shards(tmp_path / "shards", tmp_path / "journal", TASKS, function, 1)
    assert contents(tmp_path / "shards") == before
