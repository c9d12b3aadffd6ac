"""A corpus of any size that takes hardly any room: true document lengths and manifest, tars that are holes."""

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.files import sha256_of_file
from data.manifest import FORMAT_VERSION, Manifest, ShardRecord, write_manifest
from data.shard_writer import SAMPLE_TOKENS, npy_bytes
from data.shards import npy_header

VOCABULARY, EOS_ID = 50_277, 0
DTYPE = np.dtype("<u2")
TAR_BLOCK = 512


def write_synthetic_corpus(root: Path, *, shards: int, documents: int, tokens: int, seed: int = 0) -> Manifest:
    """Writes a training split.

    Document lengths are log-normal, as of web text, and shards are of uneven size. All token ids are 0.

    Args:
        root: Directory to make.
        shards: Number of shards.
        documents: Documents, about.
        tokens: Tokens, about.
        seed: Seed of the sizes.

    Returns:
        The manifest.
    """
    (root / "train").mkdir(parents=True)
    tokenizer = root / "tokenizer.json"
    tokenizer.write_text("{}")
    generator = np.random.default_rng(seed)
    sizes = generator.uniform(0.5, 1.5, shards) * documents / shards
    # The mean of a log-normal distribution is exp(mu + sigma^2 / 2).
    sigma = 1.2
    mu = np.log(tokens / documents) - sigma**2 / 2
    records = []
    for index, size in enumerate(sizes):
        normal = generator.standard_normal(max(int(size), 1), dtype=np.float32)
        lengths = np.maximum(np.exp(mu + sigma * normal), 1).astype("<u4")
        records.append(_write_shard(root / "train", index, lengths))
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        tokenizer_file=tokenizer.name,
        tokenizer_fingerprint=sha256_of_file(tokenizer),
        vocab_size=VOCABULARY,
        eos_id=EOS_ID,
        dtype=DTYPE.name,
        shards=tuple(records),
    )
    write_manifest(root / "train", manifest)
    return manifest


def _write_shard(directory: Path, index: int, lengths: NDArray[np.uint32]) -> ShardRecord:
    sidecar = npy_bytes(lengths)
    lengths_path = directory / f"shard-{index:05d}.lengths.npy"
    lengths_path.write_bytes(sidecar)
    samples = _sample_tokens(lengths)
    headers = [npy_header((count,), DTYPE) for count in samples]
    offsets, end = [], 0
    path = directory / f"shard-{index:05d}.tar"
    with open(path, "wb") as file:
        for header, count in zip(headers, samples, strict=True):
            offsets.append(end + TAR_BLOCK + len(header))
            if len(offsets) in (1, len(samples)):  # what a reader looks at
                file.seek(end + TAR_BLOCK)
                file.write(header)
            end = offsets[-1] + count * DTYPE.itemsize
            end += -end % TAR_BLOCK
        file.truncate(end)
    return ShardRecord(
        file=path.name,
        documents=len(lengths),
        tokens=int(lengths.sum(dtype=np.int64)),
        bytes=end,
        sha256=hashlib.sha256(path.name.encode() + sidecar).hexdigest(),
        lengths_file=lengths_path.name,
        lengths_bytes=len(sidecar),
        lengths_sha256=hashlib.sha256(sidecar).hexdigest(),
        sample_offsets=tuple(offsets),
        sample_tokens=tuple(samples),
    )


def _sample_tokens(lengths: NDArray[np.uint32]) -> list[int]:
    """Tokens of each sample: whole documents up to about SAMPLE_TOKENS."""
    ends = np.cumsum(lengths, dtype=np.int64)
    samples, start = [], 0
    while start < ends[-1]:
        stop = int(ends[min(int(np.searchsorted(ends, start + SAMPLE_TOKENS)), len(ends) - 1)])
        samples.append(stop - start)
        start = stop
    return samples
