"""The count table: how long the packed stream of each shard is, so that opening and seeking read no shard."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pydantic
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from data.files import write_atomically
from data.manifest import Manifest, ShardRecord
from data.shards import read_document_lengths
from data.streaming.packing import PackingSettings, ShardPacking

# Raise it whenever packing changes: it is part of the key of stored tables and of stream fingerprints.
PACKING_VERSION = 1
MAXIMUM_THREADS = 8


class _StoredTable(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str = Field(..., description="Key of the packing and of the shards that the table belongs to.")
    packed_lengths: tuple[int, ...] = Field(..., description="Slots of the packed stream of each shard.")


def packing_key(manifest: Manifest, settings: PackingSettings) -> str:
    """Identifies a packing of a split.

    Args:
        manifest: The split.
        settings: How it is padded.

    Returns:
        Hexadecimal SHA-256 of everything that packing depends on.
    """
    identity = [PACKING_VERSION, manifest.fingerprint, asdict(settings)]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def load_packed_lengths(directory: Path, manifest: Manifest, settings: PackingSettings) -> NDArray[np.int64]:
    """Gives the packed length of every shard, from the stored table or, the first time, from the sidecars.

    Sequences per shard follow for any sequence length: packed length // sequence length.

    Args:
        directory: The split's directory, where the table is kept if it can be written, else in the user's cache.
        manifest: The split.
        settings: How it is padded.

    Returns:
        [shards] number of slots.

    Raises:
        DataError: A sidecar is missing or damaged.
    """
    key = packing_key(manifest, settings)
    for folder in _table_folders(directory):
        stored = _read_table(folder / _table_name(key), key, len(manifest.shards))
        if stored is not None:
            return stored
    packed_lengths = _compute(directory, manifest, settings)
    table = _StoredTable(key=key, packed_lengths=tuple(packed_lengths.tolist()))
    for folder in _table_folders(directory):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / _table_name(key), table.model_dump_json().encode())
        except OSError:
            continue  # Read-only: the next folder, or no table at all, only costs time.
        break
    return packed_lengths


def _compute(directory: Path, manifest: Manifest, settings: PackingSettings) -> NDArray[np.int64]:
    def packed_length(record: ShardRecord) -> int:
        return ShardPacking(read_document_lengths(directory, record), settings, record.sha256).packed_length

    # Threads: the work is file reading and NumPy, both of which let other threads run.
    with ThreadPoolExecutor(min(MAXIMUM_THREADS, os.cpu_count() or 1)) as pool:
        return np.fromiter(pool.map(packed_length, manifest.shards), dtype=np.int64, count=len(manifest.shards))


def _table_name(key: str) -> str:
    return f"counts-{key[:16]}.json"


def _table_folders(directory: Path) -> list[Path]:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return [directory / "counts", cache / "block-transformer" / "counts"]


def _read_table(path: Path, key: str, shards: int) -> NDArray[np.int64] | None:
    """A table that cannot be read, or is of another packing, counts as absent."""
    try:
        table = _StoredTable.model_validate_json(path.read_bytes())
    except (OSError, pydantic.ValidationError):
        return None
    if table.key != key or len(table.packed_lengths) != shards:
        return None
    return np.asarray(table.packed_lengths, dtype=np.int64)
