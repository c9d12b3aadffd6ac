"""What two prepared directories have in common."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tqdm
from numpy.typing import NDArray

from data.inspection.corpus import CorpusSplit, open_splits

DIGEST_BYTES = 16


def compare_corpora(first: Path, second: Path, progress: bool = False) -> tuple[str, bool]:
    """Compares by tokenizer, shard and document.

    Shards of equal checksum are not read. Of the others, 16 bytes of memory are needed for each document.

    Args:
        first: A prepared directory.
        second: Another one.
        progress: Whether to show a bar.

    Returns:
        Lines for a person, and whether both hold the same documents in the same order.

    Raises:
        DataError: One of them is damaged or none.
    """
    splits = [{split.name: split for split in open_splits(root)} for root in (first, second)]
    lines, same = [], True
    for name in sorted(splits[0].keys() | splits[1].keys()):
        pair = [found.get(name) for found in splits]
        if pair[0] is None or pair[1] is None:
            lines.append(f"{name}: only in {first if pair[1] is None else second}")
            same = False
            continue
        text, equal = _compare_splits(pair[0], pair[1], progress)
        lines += text
        same = same and equal
    return "\n".join(lines), same


def _compare_splits(first: CorpusSplit, second: CorpusSplit, progress: bool) -> tuple[list[str], bool]:
    one, two = first.manifest, second.manifest
    lines = [
        f"{first.name}: {one.documents:,} and {two.documents:,} documents, {one.tokens:,} and {two.tokens:,} tokens, "
        f"{len(one.shards):,} and {len(two.shards):,} shards"
    ]
    if one.fingerprint == two.fingerprint:
        return [*lines, "  the same shards, made with the same tokenizer"], True
    if one.tokenizer_fingerprint != two.tokenizer_fingerprint:
        return [*lines, "  made with different tokenizers, so documents cannot be compared"], False
    shared = {record.sha256 for record in one.shards} & {record.sha256 for record in two.shards}
    digests = [_digests(split, shared, progress) for split in (first, second)]
    in_order = [_all_in_order(split, shared, found) for split, found in zip((first, second), digests, strict=True)]
    missing, added = _multiset_difference(*digests)
    lines += [
        f"  {len(shared):,} shards are the same; of the documents in others, {missing:,} are only in the first and "
        f"{added:,} only in the second",
    ]
    same = np.array_equal(in_order[0], in_order[1])
    if same:
        lines.append("  the same documents in the same order, in other shards")
    elif not missing and not added:
        lines.append("  the same documents in another order")
    return lines, same


def _digests(split: CorpusSplit, shared: Iterable[str], progress: bool) -> NDArray[np.void]:
    """A digest of each document outside the shared shards."""
    others = [record for record in split.manifest.shards if record.sha256 not in shared]
    digests = bytearray()
    for record in tqdm.tqdm(others, unit="shard", disable=not progress):
        for tokens in split.documents(record):
            digests += hashlib.blake2b(tokens.astype("<u4").tobytes(), digest_size=DIGEST_BYTES).digest()
    return np.frombuffer(bytes(digests), dtype=f"V{DIGEST_BYTES}")


def _all_in_order(split: CorpusSplit, shared: Iterable[str], digests: NDArray[np.void]) -> NDArray[np.void]:
    """Digests of all documents in order; a shared shard stands for its documents."""
    parts, position = [], 0
    for record in split.manifest.shards:
        if record.sha256 in shared:
            parts.append(np.frombuffer(bytes.fromhex(record.sha256)[:DIGEST_BYTES], dtype=f"V{DIGEST_BYTES}"))
        else:
            parts.append(digests[position : position + record.documents])
            position += record.documents
    return np.concatenate(parts)


def _multiset_difference(first: NDArray[np.void], second: NDArray[np.void]) -> tuple[int, int]:
    """How many items each has beyond those of the other, counted with repetitions."""
    values, where = np.unique(np.concatenate((first, second)), return_inverse=True)
    counts = [np.bincount(part, minlength=len(values)) for part in np.split(where, [len(first)])]
    surplus = counts[0] - counts[1]
    return int(surplus[surplus > 0].sum()), int(-surplus[surplus < 0].sum())
