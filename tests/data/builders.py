"""Small prepared data for tests."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.files import sha256_of_file
from data.inspection.verification import verify_corpus
from data.manifest import FORMAT_VERSION, Manifest, dtype_for, write_manifest
from data.shard_writer import ShardWriter

# Documents of consecutive ids make each token recognizable; id 0 is the end of text.
EOS_ID = 0


def numbered_documents(lengths: Sequence[int]) -> list[np.ndarray]:
    """Documents of the given lengths in which no token id, from 1 on, occurs twice."""
    ends = np.cumsum(lengths)
    return [np.arange(end - length + 1, end + 1, dtype=np.uint32) for length, end in zip(lengths, ends, strict=True)]


def write_shard(directory: Path, documents: Sequence[np.ndarray], dtype: str = "uint16", index: int = 0):
    """Writes one shard and returns its record."""
    writer = ShardWriter(directory, index, dtype)
    for document in documents:
        writer.add(document)
    return writer.finish()


def write_split(
    root: Path,
    documents: Sequence[np.ndarray],
    *,
    split: str = "train",
    shard_tokens: int = 200,
    vocab_size: int = 2**16,
) -> Manifest:
    """Writes a split of token documents, and a tokenizer file that only has a fingerprint."""
    root.mkdir(parents=True, exist_ok=True)
    tokenizer = root / "tokenizer.model"
    tokenizer.write_bytes(b"only the fingerprint of this file matters")
    dtype = dtype_for(vocab_size)
    (root / split).mkdir()
    groups: list[list[np.ndarray]] = [[]]
    for document in documents:
        if sum(map(len, groups[-1])) >= shard_tokens:
            groups.append([])
        groups[-1].append(document)
    shards = [write_shard(root / split, group, dtype, index) for index, group in enumerate(groups)]
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        tokenizer_file=tokenizer.name,
        tokenizer_fingerprint=sha256_of_file(tokenizer),
        vocab_size=vocab_size,
        eos_id=EOS_ID,
        dtype=dtype,
        shards=tuple(shards),
    )
    write_manifest(root / split, manifest)
    return manifest


def intact_shards(root: Path) -> int:
    """Number of shards of a prepared directory, after every byte of it has been checked."""
    found = verify_corpus(root)
    assert found.problems == ()
    return found.shards
