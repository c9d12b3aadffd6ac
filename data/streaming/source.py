"""One corpus as an endless stream of packed sequences."""

from collections.abc import Callable
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.config import DataConfig, SourceConfig
from data.errors import DataError
from data.shards import ShardReader, parse_document_lengths
from data.streaming.corpus_files import lengths_of, open_corpus, tar_of
from data.streaming.corpus_tokenizer import manifest_of, tokenizer_of
from data.streaming.counts import load_packed_lengths
from data.streaming.identity import SourceIdentity
from data.streaming.order import SequenceOrder, SequencePlace
from data.streaming.packing import PackedSlice, PackingSettings, ShardPacking

Split = Literal["train", "validation"]
# Open shards beyond the current shuffle window.
SPARE_OPEN_SHARDS = 8


class OpenShard(NamedTuple):
    """A shard that is being read."""

    reader: ShardReader
    packing: ShardPacking


class BadShard(NamedTuple):
    """A shard that is left out.

    Attributes:
        corpus: Fingerprint of the shards it is one of (SourceIdentity.shards).
        shard: Its number.
    """

    corpus: str
    shard: int


class SequenceRow(NamedTuple):
    """Where one sequence is to be written; the arrays are views [sequence_length]."""

    token_ids: NDArray[np.int64]
    mask: NDArray[np.bool_]
    documents: NDArray[np.int64] | None


class Source:
    """Sequences of one split of one corpus by position; positions run on over epochs.

    Attributes:
        name: Its name in the configuration.
        manifest: Its shards.
        files: Where they lie.
        order: Which sequence stands at which position.
        packed_lengths: [shards] slots of the packed stream of each shard.
    """

    def __init__(
        self, name: str, source: SourceConfig, config: DataConfig, split: Split, block_length: int, sequence_length: int
    ) -> None:
        """Opens the corpus; reads its manifest and its count table, but no shard.

        Args:
            name: Name of the source.
            source: Its settings.
            config: Settings of the whole stream.
            split: Which split.
            block_length: Tokens per block.
            sequence_length: Tokens per sequence.

        Raises:
            DataError: It is missing, damaged, or of another tokenizer.
        """
        self.name = name
        self._empty_sequences = 0
        self.files = open_corpus(source.path, config.cache)
        self.manifest = manifest_of(self.files, split)
        self.tokenizer_path = tokenizer_of(config, self.files, self.manifest)
        self._split = split
        self._sequence_length = sequence_length
        self._skips_bad_shards = config.bad_shards == "skip" and split == "train"
        self._left_out: set[int] = set()
        self._found_bad: dict[int, str] = {}
        left = config.pads_left(source)
        # Without draws the seed has no effect.
        self._settings = PackingSettings(
            block_length, left, config.pads_to_block_boundary(source), config.seed if left else 0
        )
        self.packed_lengths = load_packed_lengths(self.files, split, self.manifest, self._settings)
        self.order = SequenceOrder(
            self.packed_lengths // sequence_length,
            seed=config.seed,
            shuffle=config.shuffle and split == "train",
            window_shards=config.shuffle_window_shards,
        )
        self._prefetched: tuple[int, int] | None = None
        self._prefetch_shards = config.cache.prefetch_shards
        self.open_shard: Callable[[int], OpenShard] = lru_cache(config.shuffle_window_shards + SPARE_OPEN_SHARDS)(
            self._open_shard
        )

    @property
    def identity(self) -> SourceIdentity:
        """What decides its sequences, but for settings that all sources share."""
        return SourceIdentity(
            shards=self.manifest.fingerprint[:32],
            tokenizer=self.manifest.tokenizer_fingerprint[:32],
            random_left_padding=self._settings.random_left_padding,
            pad_to_block_boundary=self._settings.pad_to_block_boundary,
        )

    def check_files(self) -> None:
        """Checks that every shard is there with its size.

        Raises:
            DataError: One is not.
        """
        for identify in (tar_of, lengths_of):
            self.files.check_sizes(identify(self._split, record) for record in self.manifest.shards)

    def place(self, position: int) -> SequencePlace:
        """Where the sequence at a position lies."""
        return self.order.place(position)

    def locate(self, place: SequencePlace) -> PackedSlice:
        """Which tokens of its shard a sequence holds.

        Raises:
            DataError: The document lengths of the shard cannot be read.
        """
        start = place.sequence * self._sequence_length
        return self.open_shard(place.shard).packing.locate(start, start + self._sequence_length)

    def documents(self, place: SequencePlace) -> NDArray[np.int64]:
        """Which document of its shard each slot of a sequence belongs to, [sequence_length].

        Raises:
            DataError: The document lengths of the shard cannot be read.
        """
        start = place.sequence * self._sequence_length
        return self.open_shard(place.shard).packing.documents(start, start + self._sequence_length)

    def read_into(self, position: int, row: SequenceRow) -> None:
        """Reads one sequence; the row comes filled with pads, and stays so if the shard is bad and to be skipped.

        Args:
            position: Position in this source.
            row: Where it goes.

        Raises:
            DataError: The shard cannot be read, and bad shards are not to be skipped.
        """
        place = self.place(position)
        if place.shard in self._left_out:
            self._empty_sequences += 1
        if place.shard in self._left_out or place.shard in self._found_bad:
            return
        try:
            self._read(place, row)
        except DataError as error:
            if not self._skips_bad_shards:
                raise
            self._found_bad[place.shard] = str(error)

    def take_found_bad(self) -> dict[BadShard, str]:
        """Shards that turned out bad since the last call, and why; they are tried again until they are left out."""
        found, self._found_bad = self._found_bad, {}
        return {BadShard(self.identity.shards, shard): reason for shard, reason in found.items()}

    def leave_out(self, shard: int) -> None:
        """From now on gives the sequences of a shard as padding."""
        self._left_out.add(shard)

    def take_empty_sequences(self) -> int:
        """How many of the sequences read since the last call came out empty because their shard is left out."""
        taken, self._empty_sequences = self._empty_sequences, 0
        return taken

    def _read(self, place: SequencePlace, row: SequenceRow) -> None:
        piece = self.locate(place)
        tokens = self.open_shard(place.shard).reader.read(piece.token_start, piece.token_stop)
        if len(tokens) and int(tokens.max()) >= self.manifest.vocab_size:
            raise DataError(
                f"shard {self.manifest.shards[place.shard].file} of {self.files.location} holds the token id "
                f"{int(tokens.max())}, its vocabulary has {self.manifest.vocab_size}; prepare the data again"
            )
        position = 0
        for run in piece.runs:
            row.token_ids[run.start : run.start + run.tokens] = tokens[position : position + run.tokens]
            row.mask[run.start : run.stop] = True
            position += run.tokens
        if row.documents is not None:
            row.documents[:] = self.documents(place)

    def prefetch(self, position: int) -> None:
        """Asks for the shards that are read from a position on, if they lie elsewhere; returns at once."""
        if not self.files.fetches:
            return
        window = self.order.window(position)
        if window == self._prefetched:
            return
        self._prefetched = window
        shards = self.order.shards_from(*window, self._prefetch_shards)
        records = [self.manifest.shards[shard] for shard in shards]
        self.files.prefetch(identify(self._split, record) for record in records for identify in (lengths_of, tar_of))

    def _open_shard(self, shard: int) -> OpenShard:
        record = self.manifest.shards[shard]
        lengths = parse_document_lengths(self.files.path(lengths_of(self._split, record)), record)
        reader = ShardReader(self.files.path(tar_of(self._split, record)), record, self.manifest.dtype)
        return OpenShard(reader, ShardPacking(lengths, self._settings, record.sha256))
