"""Writes a new folder as a whole or not at all, and into it safetensors files of limited size."""

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from checkpoints.errors import CheckpointError
from checkpoints.files import as_os_error, storage_error, sync_directory, sync_file, write_durably
from checkpoints.weights.tensor_files import INDEX_FILE, SINGLE_FILE

MAXIMUM_FILE_BYTES = 5 * 10**9


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written, known by its size before it is read.

    Attributes:
        name: its name in the file.
        shape: its shape.
        dtype: the type in which it is stored.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Gives a temporary folder beside the target, and renames it to the target when the block ends without error.

    Raises:
        CheckpointError: the target exists, or the disk refuses; then nothing is left behind.
    """
    check_absent(target)
    temporary = target.with_name(f".{target.name}.tmp-{secrets.token_hex(8)}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        check_absent(target)
        os.rename(temporary, target)
        sync_directory(target.parent)
    except OSError as error:
        raise storage_error(target, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_absent(target: Path) -> None:
    """Makes sure that an output does not exist.

    Raises:
        CheckpointError: it does.
    """
    if target.exists() or target.is_symlink():
        raise CheckpointError(f"output {target} exists; name a new folder, or delete it first")


def group_by_size(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Puts items, in their order, into groups of at most `limit` in sum; an item above it has a group of its own.

    Returns:
        The indices of the items of each group.
    """
    groups: list[list[int]] = []
    filled = limit
    for index, size in enumerate(sizes):
        if not groups or filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(index)
        filled += size
    return groups


def write_tensors(
    directory: Path,
    planned: Sequence[PlannedTensor],
    read: Callable[[str], Tensor],
    maximum_bytes: int = MAXIMUM_FILE_BYTES,
) -> None:
    """Writes `model.safetensors`, or shards and their index where it would be larger than the limit.

    Args:
        directory: an existing folder.
        planned: what to write.
        read: gives a tensor by its name, in any type; called once for each.
        maximum_bytes: size of a file's tensors; one file is held in memory at a time.

    Raises:
        CheckpointError: the disk refuses.
    """
    groups = group_by_size([tensor.bytes for tensor in planned], maximum_bytes)
    names = [SINGLE_FILE]
    if len(groups) > 1:
        names = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    for file_name, group in zip(names, groups, strict=True):
        _write_file(directory / file_name, [planned[index] for index in group], read)
    if len(groups) > 1:
        places = {planned[i].name: name for name, group in zip(names, groups, strict=True) for i in group}
        total = sum(tensor.bytes for tensor in planned)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        write_durably(directory / INDEX_FILE, json.dumps(index, indent=2) + "\n")


def _write_file(path: Path, planned: Sequence[PlannedTensor], read: Callable[[str], Tensor]) -> None:
    tensors = {item.name: read(item.name).to(item.dtype).contiguous() for item in planned}
    for item in planned:
        if tuple(tensors[item.name].shape) != item.shape:
            raise CheckpointError(f"{item.name} has shape {tuple(tensors[item.name].shape)}, planned was {item.shape}")
    needed = sum(item.bytes for item in planned)
    try:
        save_file(tensors, path, metadata={"format": "pt"})
        sync_file(path)
    except (OSError, SafetensorError) as error:
        raise storage_error(path, as_os_error(error), needed) from error
