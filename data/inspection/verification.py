"""Reads every byte of a prepared directory and compares it with what the manifests say."""

import os
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tqdm
from numpy.typing import NDArray

from data.errors import DataError
from data.files import sha256_of_file
from data.inspection.corpus import CorpusSplit, split_names
from data.manifest import ShardRecord
from data.shard_writer import LENGTHS_MEMBER, TOKENS_MEMBER
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
        DataError: There is no split.
    """
    splits, problems = _splits(root)
    checks: list[Callable[[], None]] = []
    for split in splits:
        checks.append(lambda split=split: _verify_tokenizer(root, split))  # type: ignore[misc]
        checks += [lambda split=split, record=record: _verify_shard(split, record) for record in split.manifest.shards]  # type: ignore[misc]
    # Threads: hashing and reading let others run.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(_problem, checks)
        problems += filter(None, tqdm.tqdm(found, total=len(checks), unit="file", disable=not progress))
    return Verification(sum(len(split.manifest.shards) for split in splits), tuple(problems))


def _splits(root: Path) -> tuple[list[CorpusSplit], list[str]]:
    """The splits whose manifests can be read, and what is wrong with the others."""
    splits, problems = [], []
    for name in split_names(root):
        try:
            splits.append(CorpusSplit(root, name))
        except DataError as error:
            problems.append(str(error))
    return splits, problems


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
    try:
        offsets, lengths = _samples_in_tar(path)
    except (tarfile.TarError, ValueError, OSError) as error:
        raise DataError(f"{path} is no tar of documents ({error}); {PREPARE_AGAIN}") from None
    stored = np.concatenate([np.empty(0, dtype=np.int64), *lengths])
    if not np.array_equal(stored, split.lengths(record)):
        raise DataError(f"{path} holds other documents than {record.lengths_file} says; {PREPARE_AGAIN}")
    tokens = tuple(int(documents.sum()) for documents in lengths)
    if (tuple(offsets), tokens) != (record.sample_offsets, record.sample_tokens):
        raise DataError(f"{path} holds its samples elsewhere than its manifest says; {PREPARE_AGAIN}")
    _check_tokens(split, record)


def _compare_checksum(path: Path, expected: str) -> None:
    if not path.is_file():
        raise DataError(f"{path} is named in the manifest but missing; {PREPARE_AGAIN}")
    try:
        actual = sha256_of_file(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); {PREPARE_AGAIN}") from None
    if actual != expected:
        raise DataError(f"{path} has checksum {actual}, the manifest says {expected}; {PREPARE_AGAIN}")


def _samples_in_tar(path: Path) -> tuple[list[int], list[NDArray[np.int64]]]:
    """Where the tokens of each sample start, and the lengths of its documents."""
    # A header's length depends neither on the number of values, up to ten digits, nor on the type.
    header_bytes = len(npy_header((0,), np.dtype("<u4")))
    offsets, lengths = [], []
    with tarfile.open(path, "r:") as tar, open(path, "rb") as file:
        for member in tar:
            values = member.offset_data + header_bytes
            if member.name.endswith(TOKENS_MEMBER):
                offsets.append(values)
            elif member.name.endswith(LENGTHS_MEMBER):
                file.seek(values)
                content = file.read(max(member.size - header_bytes, 0))
                lengths.append(np.frombuffer(content, "<u4").astype(np.int64))
    return offsets, lengths


def _check_tokens(split: CorpusSplit, record: ShardRecord) -> None:
    reader = ShardReader(split.directory / record.file, record, split.manifest.dtype)
    for start in range(0, record.tokens, TOKENS_AT_A_TIME):
        tokens = reader.read(start, min(start + TOKENS_AT_A_TIME, record.tokens))
        if int(tokens.max()) >= split.manifest.vocab_size:
            raise DataError(
                f"{split.directory / record.file} holds the token id {int(tokens.max())}, its vocabulary has "
                f"{split.manifest.vocab_size}; {PREPARE_AGAIN}"
            )
