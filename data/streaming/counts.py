"""The count table: how long the packed stream of each shard is, so that opening and seeking read no shard."""

import contextlib
import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pydantic
import tqdm
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from data.files import write_atomically
from data.locations import user_cache_folder
from data.manifest import Manifest, ShardRecord
from data.shards import parse_document_lengths
from data.streaming.corpus_files import CorpusFiles, lengths_of
from data.streaming.packing import PackingSettings, ShardPacking

# Raise it whenever packing changes: it is part of the key of stored tables and of what a checkpoint records.
PACKING_VERSION = 1
MAXIMUM_THREADS = 8
# Counting fewer shards takes no time worth a word.
SHARDS_WORTH_REPORTING = 64
# How often a part of the table is stored while it is being made.
SECONDS_BETWEEN_PARTS = 1.0


class _StoredTable(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str = Field(..., description="Key of the packing and of the shards that the table belongs to.")
    packed_lengths: tuple[int, ...] = Field(..., description="Slots of the packed stream of each shard; -1 = unknown.")


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


def load_packed_lengths(
    files: CorpusFiles, split: str, manifest: Manifest, settings: PackingSettings
) -> NDArray[np.int64]:
    """Gives the packed length of every shard, from the stored table or, the first time, from the sidecars.

    Sequences per shard follow for any sequence length: packed length // sequence length. One process of those that
    share a folder makes the table, in threads; if it is interrupted, the next goes on from what it had.

    Args:
        files: Where the split lies; a table published with it is used.
        split: Its name.
        manifest: The split.
        settings: How it is padded.

    Returns:
        [shards] number of slots.

    Raises:
        DataError: A sidecar is missing or damaged.
    """
    key = packing_key(manifest, settings)
    name = f"counts-{key[:16]}.json"
    published = files.optional_metadata(f"counts/{name}")
    known = None if published is None else _read_table(published, key, len(manifest.shards))
    if known is not None and (known >= 0).all():
        return known
    folder = _writable_folder(files)
    if folder is None:
        return _build(_Table(None, key, _unknown(manifest)), files, split, manifest, settings)
    known = _read_table(folder / name, key, len(manifest.shards))
    if known is not None and (known >= 0).all():
        return known
    with _locked(folder / f".{name}.lock"):
        stored = _read_table(folder / name, key, len(manifest.shards))
        table = _Table(folder / name, key, _unknown(manifest) if stored is None else stored)
        return _build(table, files, split, manifest, settings)


class _Table:
    """The packed lengths known so far, and the file they are kept in."""

    def __init__(self, path: Path | None, key: str, packed_lengths: NDArray[np.int64]) -> None:
        self.packed_lengths = packed_lengths
        self._path = path
        self._key = key
        self._stored_at = time.monotonic()

    def set(self, shard: int, packed_length: int) -> None:
        self.packed_lengths[shard] = packed_length
        if time.monotonic() - self._stored_at > SECONDS_BETWEEN_PARTS:
            self.store()

    def store(self) -> None:
        if self._path is not None:
            table = _StoredTable(key=self._key, packed_lengths=tuple(self.packed_lengths.tolist()))
            with contextlib.suppress(OSError):  # No table only costs time.
                write_atomically(self._path, table.model_dump_json().encode())
        self._stored_at = time.monotonic()


def _build(
    table: _Table, files: CorpusFiles, split: str, manifest: Manifest, settings: PackingSettings
) -> NDArray[np.int64]:
    def packed_length(record: ShardRecord) -> int:
        lengths = parse_document_lengths(files.path(lengths_of(split, record)), record)
        return ShardPacking(lengths, settings, record.sha256).packed_length

    missing = np.flatnonzero(table.packed_lengths < 0).tolist()
    if not missing:
        return table.packed_lengths
    quiet = len(missing) < SHARDS_WORTH_REPORTING
    if not quiet:
        known = len(manifest.shards) - len(missing)
        print(
            f"counting the sequences of {len(manifest.shards):,} shards in {files.location}, once for this packing"
            + (f"; {known:,} are known" if known else ""),
            file=sys.stderr,
            flush=True,
        )
    # Threads: the work is file reading and NumPy, both of which let other threads run.
    pool = ThreadPoolExecutor(min(MAXIMUM_THREADS, os.cpu_count() or 1))
    try:
        futures = {pool.submit(packed_length, manifest.shards[shard]): shard for shard in missing}
        for future in tqdm.tqdm(
            as_completed(futures), total=len(futures), unit="shard", disable=True if quiet else None
        ):
            table.set(futures[future], future.result())
    finally:
        pool.shutdown(cancel_futures=True)
        table.store()
    return table.packed_lengths


def _unknown(manifest: Manifest) -> NDArray[np.int64]:
    return np.full(len(manifest.shards), -1, dtype=np.int64)


def _writable_folder(files: CorpusFiles) -> Path | None:
    """Where the table is kept: beside the corpus if that can be written, else in the user's cache."""
    cache = user_cache_folder()
    for folder in (files.table_folder, cache and cache / "counts"):
        if folder is None:
            continue
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    return None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keeps other processes that make the same table waiting."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:
        yield
        return
    try:
        with contextlib.suppress(OSError):  # A file system without locks: at worst the work is done twice.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _read_table(path: Path, key: str, shards: int) -> NDArray[np.int64] | None:
    """A table that cannot be read, or is of another packing, counts as absent."""
    try:
        table = _StoredTable.model_validate_json(path.read_bytes())
    except (OSError, pydantic.ValidationError):
        return None
    if table.key != key or len(table.packed_lengths) != shards:
        return None
    return np.asarray(table.packed_lengths, dtype=np.int64)
