"""The documents of a prepared directory, by split, shard and number."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.manifest import Manifest, ShardRecord, read_manifest
from data.shards import ShardReader, read_document_lengths

SPLITS = ("train", "validation")


class CorpusSplit:
    """One split of a prepared directory.

    Attributes:
        directory: Where it lies.
        name: `train` or `validation`.
        manifest: Its manifest.
    """

    def __init__(self, root: Path, name: str) -> None:
        """Reads the manifest.

        Args:
            root: The prepared directory.
            name: Name of the split.

        Raises:
            DataError: There is no such split, or its manifest is damaged.
        """
        self.name = name
        self.directory = root / name
        self.manifest: Manifest = read_manifest(self.directory)

    def shard(self, index: int) -> ShardRecord:
        """A shard by number.

        Raises:
            DataError: There is no such shard.
        """
        count = len(self.manifest.shards)
        if not 0 <= index < count:
            raise DataError(f"--shard {index}: {self.directory} has the shards 0 to {count - 1}")
        return self.manifest.shards[index]

    def lengths(self, record: ShardRecord) -> NDArray[np.int64]:
        """Tokens of each document of a shard.

        Raises:
            DataError: The sidecar is missing or damaged.
        """
        return read_document_lengths(self.directory, record)

    def documents(self, record: ShardRecord, first: int = 0, count: int | None = None) -> Iterator[NDArray[np.int64]]:
        """Yields the tokens of consecutive documents of a shard.

        Args:
            record: The shard.
            first: Number of the first document.
            count: How many; None for all.

        Raises:
            DataError: There is no such document, or the shard is damaged.
        """
        lengths = self.lengths(record)
        if not 0 <= first < len(lengths):
            raise DataError(f"--first {first}: {self.directory / record.file} has documents 0 to {len(lengths) - 1}")
        reader = ShardReader(self.directory / record.file, record, self.manifest.dtype)
        ends = np.cumsum(lengths)
        stop = len(lengths) if count is None else min(first + count, len(lengths))
        for document in range(first, stop):
            yield reader.read(int(ends[document] - lengths[document]), int(ends[document])).astype(np.int64)


def open_splits(root: Path) -> list[CorpusSplit]:
    """Opens all splits of a prepared directory.

    Args:
        root: The directory.

    Returns:
        The splits that it has.

    Raises:
        DataError: It has none, or a manifest is damaged.
    """
    return [CorpusSplit(root, name) for name in split_names(root)]


def split_names(root: Path) -> list[str]:
    """Finds the splits of a prepared directory.

    Args:
        root: The directory.

    Returns:
        Names of the splits that it has.

    Raises:
        DataError: It has none.
    """
    found = [name for name in SPLITS if (root / name).is_dir()]
    if not found:
        raise DataError(f"{root} holds neither train/ nor validation/; make them with tools/prepare_data.py")
    return found
