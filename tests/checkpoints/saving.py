"""A small model state in fragments, as two ranks of a run would save it."""

from pathlib import Path

import torch

from checkpoints.fragments import FileRecord, Fragment, FragmentReader, write_fragments
from checkpoints.records import KINDS
from checkpoints.store import CheckpointStore

SHAPE = (4, 6)


def values_at(step: int, kind: str) -> torch.Tensor:
    """The tensor of SHAPE that the run holds at a step."""
    return torch.arange(24.0).view(SHAPE) + 1000 * step + 100 * KINDS.index(kind)


def write_rank(directory: Path, step: int, rank: int) -> FileRecord:
    """Write the half of the rows that one of two tensor-parallel ranks holds."""
    rows = (2 * rank, 2 * rank + 2)
    pieces = [
        (Fragment("layer.weight", kind, SHAPE, 0, *rows, 0, 12), values_at(step, kind)[slice(*rows)].flatten())
        for kind in KINDS
    ]
    return write_fragments(directory / f"rank_{rank:05d}.safetensors", pieces)


def save(store: CheckpointStore, step: int) -> Path:
    """Save a step completely."""
    temporary = store.begin(step)
    records = [write_rank(temporary, step, rank) for rank in (0, 1)]
    path = store.publish(step, temporary, records, {"step": step, "consumed_sequences": 8 * step})
    store.prune()
    return path


def assert_holds(path: Path, step: int) -> None:
    """Check every value of a published step."""
    with FragmentReader(path) as reader:
        for kind in KINDS:
            assert torch.equal(reader.read_full("layer.weight", kind), values_at(step, kind))
