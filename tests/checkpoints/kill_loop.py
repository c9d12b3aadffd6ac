"""Kills a saving process at random times and checks the store after each kill; prints a summary as JSON.

Forks, so that torch is imported once: python -m tests.checkpoints.kill_loop ROOT KILLS
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from checkpoints.store import CheckpointStore
from tests.checkpoints.saving import assert_holds, save


def save_forever(root: Path, first: int, confirmations: int) -> None:
    """Save step after step, and report each one that is published."""
    store = CheckpointStore(root)
    step = first
    while True:
        save(store, step)
        os.write(confirmations, step.to_bytes(8, "big"))
        step += 1


def seconds_of_a_save(root: Path) -> float:
    """Saves step 1; as fast as this disk is."""
    began = time.monotonic()
    saving = os.fork()
    if saving == 0:
        save(CheckpointStore(root), 1)
        os._exit(0)
    assert os.waitpid(saving, 0)[1] == 0
    return time.monotonic() - began


def kill_once(root: Path, first: int, delay: float) -> int:
    """Start saving, kill after a delay in seconds; returns the last step that the victim reported, or 0."""
    reading, writing = os.pipe()
    victim = os.fork()
    if victim == 0:
        os.close(reading)
        save_forever(root, first, writing)
    os.close(writing)
    time.sleep(delay)
    os.kill(victim, signal.SIGKILL)
    os.waitpid(victim, 0)
    with os.fdopen(reading, "rb") as pipe:
        reports = pipe.read()
    return int.from_bytes(reports[-8:], "big")


def main(root: Path, kills: int) -> None:
    """Kill, check, and start again from what survived."""
    longest = max(0.08, 4 * seconds_of_a_save(root))
    newest, unfinished = 1, 0
    for _ in range(kills):
        confirmed = kill_once(root, newest + 1, random.uniform(0.002, longest))
        unfinished += any(".tmp-" in path.name for path in root.iterdir())
        loaded = CheckpointStore(root).newest()
        found = 0 if loaded is None else loaded.step
        assert found >= max(confirmed, newest), f"step {max(confirmed, newest)} was published, {found} is there"
        if loaded is not None:
            assert loaded.skipped == (), loaded.skipped
            assert_holds(loaded.path, loaded.step)
        newest = found
    print(json.dumps({"kills": kills, "published": newest, "unfinished_saves": unfinished}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
