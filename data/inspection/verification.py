"""Reads every byte of a prepared directory and compares it with what the manifests say."""

import os
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tqdm
from numpy.typing import NDArray

from data.errors import DataError
from data.files import sha256_of_file
from data.inspection.corpus import CorpusSplit, open_splits
from data.manifest import ShardRecord
from data.shard_writer import LENGTHS_MEMBER
from data.shards import PREPARE_AGAIN, ShardReader, check_size, npy_header

TOKENS_AT_A_TIME = 2**22


@dataclass(frozen=True)
class Verification:
    """What was found.

    Attributes:
        shards: Number of shards that were read.
        problems: A sentence for each damaged file.
    """

    shards: int
    problems: tuple[str, ...]


def verify_corpus(root: Path, progress: bool = False) -> Verification:
    """Checks all splits: sizes, checksums, that tars, sidecars and manifest agree, and that every token is possible.

    Args:
        root: A prepared directory.
        progress: Whether to show a bar.

    Returns:
        The number of shards and what is wrong with them.

    Raises:
        DataError: There is no split, or a manifest is damaged.
    """
    splits = open_splits(root)
    checks: list[Callable[[], None]] = []
    for split in splits:
        checks.append(lambda split=split: _verify_tokenizer(root, split))  # type: ignore[misc]
        checks += [lambda split=split, record=record: _verify_shard(split, record) for record in split.manifest.shards]  # type: ignore[misc]
    # Threads: hashing and reading let others run.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(_problem, checks)
        problems = tuple(filter(None, tqdm.tqdm(found, total=len(checks), unit="file", disable=not progress)))
    return Verification(sum(len(split.manifest.shards) for split in splits), problems)


def _problem(check: Callable[[], None]) -> str | None:
    try:
        check()
    except DataError as error:
        return str(error)
    return None


def _verify_tokenizer(root: Path, split: CorpusSplit) -> None:
    _compare_checksum(root / split.manifest.tokenizer_file, split.manifest.tokenizer_fingerprint)


def _verify_shard(split: CorpusSplit, record: ShardRecord) -> None:
    path = split.directory / record.file
    check_size(path, record.bytes)
    check_size(split.directory / record.lengths_file, record.lengths_bytes)
    _compare_checksum(path, record.sha256)
    _compare_checksum(split.directory / record.lengths_file, record.lengths_sha256)
    stored = np.concatenate([np.empty(0, dtype=np.int64), *_lengths_in_tar(path)])
    if not np.array_equal(stored, split.lengths(record)):
        raise DataError(f"{path} holds other documents than {record.lengths_file} says; {PREPARE_AGAIN}")
    _check_tokens(split, record)


def _compare_checksum(path: Path, expected: str) -> None:
    if not path.is_file():
        raise DataError(f"{path} is named in the manifest but missing; {PREPARE_AGAIN}")
    actual = sha256_of_file(path)
    if actual != expected:
        raise DataError(f"{path} has checksum {actual}, the manifest says {expected}; {PREPARE_AGAIN}")


def _lengths_in_tar(path: Path) -> Iterator[NDArray[np.int64]]:
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            if member.name.endswith(LENGTHS_MEMBER):
                content = tar.extractfile(member)
                assert content is not None
                values = content.read()
                # The header's length does not depend on the number of documents, up to ten digits.
                yield np.frombuffer(values, "<u4", offset=len(npy_header((0,), np.dtype("<u4")))).astype(np.int64)


def _check_tokens(split: CorpusSplit, record: ShardRecord) -> None:
    reader = ShardReader(split.directory / record.file, record, split.manifest.dtype)
    for start in range(0, record.tokens, TOKENS_AT_A_TIME):
        tokens = reader.read(start, min(start + TOKENS_AT_A_TIME, record.tokens))
        if int(tokens.max()) >= split.manifest.vocab_size:
            raise DataError(
                f"{split.directory / record.file} holds the token id {int(tokens.max())}, its vocabulary has "
                f"{split.manifest.vocab_size}; {PREPARE_AGAIN}"
            )
