"""The endless, deterministic stream of packed sequences that training and evaluation read."""

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.config import DataConfig
from data.errors import DataError
from data.files import sha256_of_file
from data.manifest import Manifest, read_manifest
from data.shards import ShardReader, check_sizes, read_document_lengths
from data.streaming.counts import load_packed_lengths, packing_key
from data.streaming.order import ORDER_VERSION, SampleId, SequenceOrder
from data.streaming.packing import PackingSettings, ShardPacking

Split = Literal["train", "validation"]
# Open shards beyond the current shuffle window.
SPARE_OPEN_SHARDS = 8


@dataclass(frozen=True)
class PackedSequences:
    """A run of sequences.

    Attributes:
        token_ids: [count, sequence_length] int64; pads hold the end-of-text id.
        mask: [count, sequence_length] bool, true for real tokens, which a real end of text is.
    """

    token_ids: NDArray[np.int64]
    mask: NDArray[np.bool_]


class _OpenShard(NamedTuple):
    reader: ShardReader
    packing: ShardPacking


class SequenceStream:
    """Sequences of one split by position; positions run on over epochs.

    The order depends on the manifest, the seed and the epoch only, so every rank computes its own positions and a
    resumed run seeks.

    Attributes:
        fingerprint: Identity of the shards, their packing and their order; a checkpoint stores it with the position.
        sequences_per_epoch: Sequences in one pass.
        vocab_size: One more than the largest token id.
        eos_id: End-of-text token, also the id of pads.
        tokenizer_path: The tokenizer the shards were made with.
    """

    def __init__(
        self,
        config: DataConfig,
        split: Split,
        *,
        block_length: int,
        sequence_length: int,
        minimum_sequences: int = 1,
    ) -> None:
        """Opens a split; reads the manifest and the count table, but no shard.

        Args:
            config: Data settings.
            split: Which split.
            block_length: Tokens per block.
            sequence_length: Tokens per sequence, a multiple of the block length.
            minimum_sequences: Fewer sequences per epoch are an error, for example the global batch size.

        Raises:
            DataError: The data is missing, damaged, too small, or of another tokenizer.
        """
        if block_length < 1 or sequence_length < 1 or sequence_length % block_length:
            raise DataError(
                f"sequence length {sequence_length} is no multiple of block length {block_length}; change either"
            )
        self._split = split
        self._directory = _split_directory(config, split)
        self._manifest = read_manifest(self._directory)
        check_sizes(self._directory, self._manifest)
        self.tokenizer_path = _check_tokenizer(config, self._manifest)
        self.vocab_size = self._manifest.vocab_size
        self.eos_id = self._manifest.eos_id
        self.sequence_length = sequence_length
        self._settings = _packing_settings(config, block_length)
        self._packed_lengths = load_packed_lengths(self._directory, self._manifest, self._settings)
        shuffle = config.shuffle and split == "train"
        self._order = SequenceOrder(
            self._packed_lengths // sequence_length,
            seed=config.seed,
            shuffle=shuffle,
            window_shards=config.shuffle_window_shards,
        )
        self.sequences_per_epoch = self._order.sequences_per_epoch
        self.fingerprint = _fingerprint(self._manifest, self._settings, config, sequence_length, shuffle)
        self._open = lru_cache(config.shuffle_window_shards + SPARE_OPEN_SHARDS)(self._open_shard)
        self._check_size(config, max(minimum_sequences, 1))

    def _check_size(self, config: DataConfig, minimum: int) -> None:
        if self.sequences_per_epoch < minimum:
            raise DataError(
                f"the {self._split} split of {config.path} gives {self.sequences_per_epoch} sequences of "
                f"{self.sequence_length} tokens, at least {minimum} are needed; prepare more text, or lower the "
                "sequence length or the batch size"
            )

    def _open_shard(self, shard: int) -> _OpenShard:
        record = self._manifest.shards[shard]
        lengths = read_document_lengths(self._directory, record)
        reader = ShardReader(self._directory / record.file, record, self._manifest.dtype)
        return _OpenShard(reader, ShardPacking(lengths, self._settings, record.sha256))

    def read(self, position: int, count: int) -> PackedSequences:
        """Reads sequences [position, position + count).

        Args:
            position: First position; runs on over epochs.
            count: Number of sequences.

        Returns:
            The sequences in stream order.

        Raises:
            DataError: A shard cannot be read.
        """
        token_ids = np.full((count, self.sequence_length), self.eos_id, dtype=np.int64)
        mask = np.zeros((count, self.sequence_length), dtype=np.bool_)
        for row, sample in enumerate(self.sample_ids(position, count)):
            shard = self._open(sample.shard)
            start = sample.sequence * self.sequence_length
            piece = shard.packing.locate(start, start + self.sequence_length)
            token_ids[row, piece.token_slots] = shard.reader.read(piece.token_start, piece.token_stop)
            mask[row, piece.token_slots] = True
            mask[row, piece.eos_slots] = True
        return PackedSequences(token_ids, mask)

    def sample_ids(self, position: int, count: int) -> list[SampleId]:
        """Names sequences [position, position + count) without reading them.

        Args:
            position: First position; runs on over epochs.
            count: Number of sequences.

        Returns:
            `count` ids of (epoch, shard, sequence in the shard).
        """
        if position < 0 or count < 0:
            raise ValueError(f"position {position} and count {count} must not be negative")
        return self._order.sample_ids(position, count)

    def describe(self) -> str:
        """Sums up the split in one line."""
        manifest, slots = self._manifest, int(self._packed_lengths.sum())
        padding = slots - manifest.tokens - manifest.documents
        dropped = slots - self.sequences_per_epoch * self.sequence_length
        return (
            f"{self._split}: {manifest.documents:,} documents, {manifest.tokens:,} tokens in "
            f"{len(manifest.shards):,} shards; {self.sequences_per_epoch:,} sequences of {self.sequence_length:,} per "
            f"epoch, {padding / max(slots, 1):.2%} padding, {dropped:,} slots dropped at the ends of shards"
        )


def _split_directory(config: DataConfig, split: Split) -> Path:
    if not config.path.is_dir():
        raise DataError(f"data.path {config.path} does not exist; make it with tools/prepare_data.py --output")
    directory = config.path / split
    if not directory.is_dir():
        option = "--validation-input or --validation-fraction" if split == "validation" else "--input"
        raise DataError(
            f"data.path {config.path} has no {split} split; prepare it with tools/prepare_data.py and {option}"
        )
    return directory


def _packing_settings(config: DataConfig, block_length: int) -> PackingSettings:
    return PackingSettings(
        block_length=block_length,
        random_left_padding=config.random_left_padding,
        pad_to_block_boundary=config.pad_to_block_boundary,
        # Without draws the seed has no effect, so it must not change the fingerprint either.
        seed=config.seed if config.random_left_padding else 0,
    )


def _check_tokenizer(config: DataConfig, manifest: Manifest) -> Path:
    path = config.tokenizer or config.path / manifest.tokenizer_file
    if not path.is_file():
        raise DataError(f"tokenizer {path} does not exist; give data.tokenizer, or prepare the data again")
    fingerprint = sha256_of_file(path)
    if fingerprint != manifest.tokenizer_fingerprint:
        raise DataError(
            f"tokenizer {path} has fingerprint {fingerprint}, but the shards in {config.path} were made with "
            f"{manifest.tokenizer_fingerprint}; give that tokenizer, or prepare the data again with this one"
        )
    return path


def _fingerprint(
    manifest: Manifest, settings: PackingSettings, config: DataConfig, sequence_length: int, shuffle: bool
) -> str:
    # Settings that have no effect without shuffling stay out.
    order = [ORDER_VERSION, config.seed, config.shuffle_window_shards] if shuffle else []
    identity = [packing_key(manifest, settings), sequence_length, order]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()
