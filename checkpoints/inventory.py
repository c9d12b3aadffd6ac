"""Lists, verifies, explains and prunes the checkpoints of a run, in words."""

import time
from pathlib import Path

from checkpoints.errors import CheckpointError
from checkpoints.records import Manifest
from checkpoints.store import CheckpointStore, verify_checkpoint

GIB = 2**30


def _store(run: Path, keep_last: int = 2, keep_every: int | None = None) -> CheckpointStore:
    root = run / "checkpoints"
    if not root.is_dir():
        raise CheckpointError(f"{run} holds no checkpoints; give the folder of a run, such as runs/NAME")
    return CheckpointStore(root, keep_last, keep_every)


def list_checkpoints(run: Path) -> str:
    """A line for each published step: size, age, and whether files are missing; reads no checksums."""
    lines = []
    for step, path in _store(run).published().items():
        try:
            manifest = verify_checkpoint(path, checksums=False)
            hours = (time.time() - path.stat().st_mtime) / 3600
            lines.append(f"step {step}: {_size(manifest)}, {len(manifest.files)} files, {hours:.1f} hours old")
        except CheckpointError as error:
            lines.append(f"step {step}: damaged: {error}")
    return "\n".join(lines) or "no checkpoint"


def verify(run: Path, step: int | None = None) -> tuple[str, bool]:
    """Compares every file with its checksum.

    Args:
        run: the run's folder.
        step: only this step; by default all.

    Returns:
        A line for each step, and whether all are intact.

    Raises:
        CheckpointError: there is no such step.
    """
    published = _store(run).published()
    if step is not None and step not in published:
        there = ", ".join(map(str, published)) or "none"
        raise CheckpointError(f"{run} has no checkpoint of step {step}; there are {there}")
    lines, intact = [], True
    for number, path in published.items():
        if step is not None and number != step:
            continue
        try:
            manifest = verify_checkpoint(path)
            lines.append(f"step {number}: intact, {len(manifest.files)} files, {_size(manifest)}")
        except CheckpointError as error:
            intact = False
            lines.append(f"step {number}: damaged: {error}")
    return "\n".join(lines) or "no checkpoint", intact


def explain(run: Path, step: int | None = None) -> str:
    """What a checkpoint holds and how it was written; of the newest intact step by default.

    Raises:
        CheckpointError: there is none.
    """
    store = _store(run)
    found = store.newest() if step is None else store.at_step(step)
    if found is None:
        raise CheckpointError(f"{run} holds no checkpoint yet")
    manifest = verify_checkpoint(found.path, checksums=False)
    fragments = [fragment for record in manifest.files for fragment in record.fragments]
    kinds = sorted({fragment.kind for fragment in fragments})
    lines = [
        f"step {found.step} in {found.path}: {_size(manifest)} in {len(manifest.files)} files",
        f"  {len({fragment.name for fragment in fragments})} parameters as {', '.join(kinds)}, in "
        f"{len(fragments)} fragments; any layout can read it",
    ]
    for name in ("progress", "code_version", "source"):
        if name in found.metadata:
            lines.append(f"  {name}: {found.metadata[name]}")
    parallel = (found.metadata.get("config") or {}).get("parallel")
    if parallel:
        lines.append(f"  written under {parallel}")
    lines += [f"  passed over: step {number}: {reason}" for number, reason in found.skipped]
    return "\n".join(lines)


def prune(run: Path, keep_last: int, keep_every: int | None, dry_run: bool) -> str:
    """Deletes old checkpoints; waits until they are gone.

    Args:
        run: the run's folder.
        keep_last: newest complete ones to keep, at least 1.
        keep_every: also keep each step that is a multiple.
        dry_run: only say which.

    Raises:
        CheckpointError: a number is too small, or no checkpoint is intact.
    """
    if keep_last < 1 or (keep_every is not None and keep_every < 1):
        raise CheckpointError(f"--keep {keep_last} and --keep-every {keep_every} must be at least 1")
    store = _store(run, keep_last, keep_every)
    store.newest()  # an intact one must stay: those found damaged on the way to it do not count
    retired = store.retirable() if dry_run else store.prune()
    store.wait()
    listed = ", ".join(map(str, retired)) or "none"
    return f"{'would delete' if dry_run else 'deleted'} steps: {listed}"


def _size(manifest: Manifest) -> str:
    return f"{sum(record.bytes for record in manifest.files) / GIB:.2f} GiB"
