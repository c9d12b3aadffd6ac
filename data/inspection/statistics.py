"""What a prepared directory holds, in numbers."""

from pathlib import Path

import numpy as np

from data.errors import DataError
from data.inspection.corpus import CorpusSplit, open_splits
from data.streaming.packing import PackingSettings, ShardPacking

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
LONGEST = 2**31 - 1


def describe_corpus(root: Path, block_length: int, sequence_length: int) -> str:
    """Describes every split: sizes, document lengths, and what packing makes of it.

    Args:
        root: A prepared directory.
        block_length: Tokens per block.
        sequence_length: Tokens per sequence.

    Returns:
        Lines for a person.

    Raises:
        DataError: A length is impossible, or the directory holds no split, or a damaged one.
    """
    if not 1 <= sequence_length <= LONGEST:
        raise DataError(f"--sequence-length {sequence_length} must be from 1 to {LONGEST}")
    if not 1 <= block_length <= sequence_length:
        raise DataError(f"--block-length {block_length} must be from 1 to --sequence-length {sequence_length}")
    return "\n".join(
        line for split in open_splits(root) for line in _describe_split(split, block_length, sequence_length)
    )


def _describe_split(split: CorpusSplit, block_length: int, sequence_length: int) -> list[str]:
    manifest = split.manifest
    lengths = [split.lengths(record) for record in manifest.shards]
    quantiles = np.quantile(np.concatenate(lengths), QUANTILES)
    sizes = [record.tokens for record in manifest.shards]
    lines = [
        f"{split.name}: {manifest.documents:,} documents, {manifest.tokens:,} tokens of {manifest.dtype} in "
        f"{len(manifest.shards):,} shards of {min(sizes):,} to {max(sizes):,} tokens, "
        f"{sum(record.bytes for record in manifest.shards) / 2**30:.3f} GiB",
        f"  tokenizer {manifest.tokenizer_fingerprint[:16]}, {manifest.vocab_size:,} ids, end of text "
        f"{manifest.eos_id}; fingerprint {manifest.fingerprint[:16]}",
        "  tokens per document: mean "
        + f"{manifest.tokens / manifest.documents:,.1f}; "
        + ", ".join(f"{share:.0%} {value:,.0f}" for share, value in zip(QUANTILES, quantiles, strict=True)),
    ]
    for padding in (True, False):
        settings = PackingSettings(block_length, padding, padding, 0)
        packed = [
            ShardPacking(shard, settings, record.sha256) for shard, record in zip(lengths, manifest.shards, strict=True)
        ]
        slots = sum(shard.packed_length for shard in packed)
        sequences = sum(shard.packed_length // sequence_length for shard in packed)
        lines.append(
            f"  {'with' if padding else 'without'} padding to blocks of {block_length}: {sequences:,} sequences of "
            f"{sequence_length:,}, {sum(shard.padding for shard in packed) / slots:.2%} padding, "
            f"{1 - sequences * sequence_length / slots:.2%} dropped at the ends of shards"
        )
    return lines
