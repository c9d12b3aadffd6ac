"""The endless, deterministic stream of packed sequences that training and evaluation read."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.config import DataConfig, SourceConfig
from data.errors import DataError
from data.streaming.counts import PACKING_VERSION
from data.streaming.identity import StageIdentity, StreamIdentity
from data.streaming.mixture import MIXTURE_VERSION, Mixture, MixtureStage, shares_of
from data.streaming.order import ORDER_VERSION
from data.streaming.source import BadShard, SequenceRow, Source, Split


@dataclass(frozen=True)
class PackedSequences:
    """A run of sequences.

    Attributes:
        token_ids: [count, sequence_length] int64; pads hold the end-of-text id.
        mask: [count, sequence_length] bool, true for real tokens, which a real end of text is.
        documents: [count, sequence_length] int64, equal for slots of the same document; None if documents are not
            kept apart.
    """

    token_ids: NDArray[np.int64]
    mask: NDArray[np.bool_]
    documents: NDArray[np.int64] | None = None


class SampleId(NamedTuple):
    """Names one sequence of the endless stream.

    Attributes:
        source: Name of its source.
        epoch: Pass over the source's split, from 0.
        shard: Index of the shard in the source's manifest.
        sequence: Index of the sequence in the shard.
    """

    source: str
    epoch: int
    shard: int
    sequence: int


class SequenceStream:
    """Sequences of one split by position; positions run on over epochs.

    The order depends on the manifests, the seed and the stages only, so every rank computes its own positions and a
    resumed run seeks.

    Attributes:
        sources: The corpora.
        identity: What decides the sequences and their order; a checkpoint stores it with the position.
        sequences_per_epoch: Positions until a sequence comes again; of a mixture, with the shares of its first stage.
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
        """Opens a split; reads manifests and count tables, but no shard.

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
        self._isolates = config.isolate_documents
        self.sequence_length = sequence_length
        chosen = _sources_of(config, split)
        _check_isolation(config, chosen, block_length)
        self.sources = [
            Source(name, source, config, split, block_length, sequence_length) for name, source in chosen.items()
        ]
        _check_same_tokenizer(self.sources)
        _check_different(config, self.sources)
        first = self.sources[0]
        self.tokenizer_path: Path = first.tokenizer_path
        self.vocab_size = first.manifest.vocab_size
        self.eos_id = first.manifest.eos_id
        counts = [source.order.sequences_per_epoch for source in self.sources]
        validates = split == "validation"
        stages = _even_stages(counts) if validates else _stages(config, list(chosen), sequence_length)
        self._mixture = Mixture(stages)
        self.identity = self._identity(config, block_length, stages)
        self._check_not_empty(stages)
        self.sequences_per_epoch = sum(counts) if validates else self._mixture.first_repetition(counts)
        self._check_size(max(minimum_sequences, 1))

    def _identity(self, config: DataConfig, block_length: int, stages: list[MixtureStage]) -> StreamIdentity:
        shuffles = config.shuffle and self._split == "train"
        sources = {source.name: source.identity for source in self.sources}
        draws = shuffles or any(identity.random_left_padding for identity in sources.values())
        return StreamIdentity(
            versions=(PACKING_VERSION, ORDER_VERSION, MIXTURE_VERSION),
            block_length=block_length,
            sequence_length=self.sequence_length,
            isolate_documents=self._isolates,
            # Settings that have no effect stay out.
            seed=config.seed if draws else None,
            shuffle_window_shards=config.shuffle_window_shards if shuffles else None,
            sources=sources,
            stages=tuple(
                StageIdentity(
                    begin=stage.begin,
                    shares={name: share for name, share in zip(sources, stage.shares, strict=True) if share},
                )
                for stage in stages
            ),
        )

    def _check_not_empty(self, stages: list[MixtureStage]) -> None:
        for index, source in enumerate(self.sources):
            if any(stage.shares[index] for stage in stages) and not source.order.sequences_per_epoch:
                self._raise_too_small(source, 0, 1)

    def _check_size(self, minimum: int) -> None:
        if self.sequences_per_epoch >= minimum:
            return
        wanted = [self._mixture.locate(position) for position in range(minimum)]
        for index, source in enumerate(self.sources):
            needed = max((position + 1 for number, position in wanted if number == index), default=0)
            if needed > source.order.sequences_per_epoch:
                self._raise_too_small(source, source.order.sequences_per_epoch, needed)

    def _raise_too_small(self, source: Source, found: int, needed: int) -> None:
        raise DataError(
            f"the {self._split} split of {source.files.location} gives {found} sequences of {self.sequence_length} "
            f"tokens, at least {needed} are needed; prepare more text, or lower the sequence length or the batch size"
        )

    def check_files(self) -> None:
        """Checks that every shard of every source is there with its size, where that costs no transfer.

        Raises:
            DataError: One is not.
        """
        for source in self.sources:
            source.check_files()

    def take_found_bad_shards(self) -> dict[BadShard, str]:
        """Shards that turned out bad since the last call, and why (with data.bad_shards=skip).

        What was read of them is not to be used: processes must agree on them, leave them out and read again, so that
        all see the same sequences.
        """
        return {shard: reason for source in self.sources for shard, reason in source.take_found_bad().items()}

    def leave_out(self, bad_shards: Iterable[BadShard]) -> None:
        """From now on gives the sequences of these shards as padding; no other sequence moves."""
        for corpus, shard in bad_shards:
            for source in self.sources:
                if source.identity.shards == corpus:
                    source.leave_out(shard)

    def take_empty_sequences(self) -> int:
        """How many of the sequences read since the last call came out empty because their shard is left out."""
        return sum(source.take_empty_sequences() for source in self.sources)

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
        _check_range(position, count)
        shape = (count, self.sequence_length)
        token_ids = np.full(shape, self.eos_id, dtype=np.int64)
        mask = np.zeros(shape, dtype=np.bool_)
        documents = np.zeros(shape, dtype=np.int64) if self._isolates else None
        for row in range(count):
            index, place = self._mixture.locate(position + row)
            self.sources[index].prefetch(place)
            self.sources[index].read_into(
                place, SequenceRow(token_ids[row], mask[row], None if documents is None else documents[row])
            )
        return PackedSequences(token_ids, mask, documents)

    def sample_ids(self, position: int, count: int) -> list[SampleId]:
        """Names sequences [position, position + count) without reading them.

        Args:
            position: First position; runs on over epochs.
            count: Number of sequences.

        Returns:
            `count` ids.
        """
        _check_range(position, count)
        ids = []
        for index in range(position, position + count):
            number, place = self._mixture.locate(index)
            source = self.sources[number]
            ids.append(SampleId(source.name, *source.place(place)))
        return ids

    def documents(self, position: int) -> NDArray[np.int64]:
        """Finds which document of its shard each slot of a sequence belongs to, without reading tokens.

        Args:
            position: Position of the sequence.

        Returns:
            [sequence_length] numbers of documents.

        Raises:
            DataError: The document lengths of the shard cannot be read.
        """
        number, place = self._mixture.locate(position)
        source = self.sources[number]
        return source.documents(source.place(place))

    def describe(self) -> str:
        """Sums up the split, one line for each source."""
        lines = [self._describe(source) for source in self.sources]
        if len(self.sources) > 1 and self._split == "train":
            lines += [_describe_stage(stage) for stage in self.identity.stages]
        return "\n".join(lines)

    def _describe(self, source: Source) -> str:
        manifest, slots = source.manifest, int(source.packed_lengths.sum())
        padding = slots - manifest.tokens - manifest.documents
        sequences = source.order.sequences_per_epoch
        dropped = slots - sequences * self.sequence_length
        name = self._split if len(self.sources) == 1 else f"{self._split} {source.name}"
        return (
            f"{name}: {manifest.documents:,} documents, {manifest.tokens:,} tokens in "
            f"{len(manifest.shards):,} shards; {sequences:,} sequences of {self.sequence_length:,} per "
            f"epoch, {padding / max(slots, 1):.2%} padding, {dropped:,} slots dropped at the ends of shards"
        )


def _describe_stage(stage: StageIdentity) -> str:
    total = sum(stage.shares.values())
    shares = ", ".join(f"{name} {share:,} of {total:,}" for name, share in stage.shares.items())
    return f"from sequence {stage.begin:,} on: {shares}"


def _check_range(position: int, count: int) -> None:
    if position < 0 or count < 0:
        raise ValueError(f"position {position} and count {count} must not be negative")


def _sources_of(config: DataConfig, split: Split) -> dict[str, SourceConfig]:
    # By name: the order in a file is of no meaning.
    chosen = {name: one for name, one in sorted(config.corpora.items()) if split == "train" or one.validation}
    if not chosen:
        raise DataError("no source has data.sources.NAME.validation=true; set it for one, or validation.every=0")
    return chosen


def _check_isolation(config: DataConfig, sources: Mapping[str, SourceConfig], block_length: int) -> None:
    mixing = [name for name, source in sources.items() if not config.pads_to_block_boundary(source)]
    if config.isolate_documents and block_length > 1 and mixing:
        raise DataError(
            f"data.isolate_documents=true needs pad_to_block_boundary=true, but it is false for {', '.join(mixing)}: "
            "a block that mixes two documents belongs to neither; change either"
        )


def _check_same_tokenizer(sources: list[Source]) -> None:
    first = sources[0]
    for source in sources[1:]:
        if source.manifest.tokenizer_fingerprint != first.manifest.tokenizer_fingerprint:
            raise DataError(
                f"source {source.name} ({source.files.location}) was made with another tokenizer than source "
                f"{first.name} ({first.files.location}); prepare one of them again with the other's"
            )


def _stages(config: DataConfig, names: list[str], sequence_length: int) -> list[MixtureStage]:
    """The stages of training."""
    stages = [MixtureStage(0, shares_of([config.corpora[name].weight for name in names]))]
    for stage in config.stages:
        begin = -(-stage.from_tokens // sequence_length)
        if begin == stages[-1].begin:
            raise DataError(
                f"data.stages: the one from_tokens={stage.from_tokens} begins with the same sequence of "
                f"{sequence_length} tokens as the one before it; give it a later begin"
            )
        stages.append(MixtureStage(begin, shares_of([stage.weights.get(name, 0.0) for name in names])))
    return stages


def _check_different(config: DataConfig, sources: list[Source]) -> None:
    """In one stage the same shards would give the same sequences twice; in a later stage they begin anew."""
    groups = [{name: one.weight for name, one in config.corpora.items()}, *(stage.weights for stage in config.stages)]
    for weights in groups:
        used: dict[str, str] = {}
        for source in sources:
            if not weights.get(source.name):
                continue
            other = used.setdefault(source.manifest.fingerprint, source.name)
            if other != source.name:
                raise DataError(
                    f"the sources {other} and {source.name} are the same shards; give one of them the weight of both"
                )


def _even_stages(counts: Sequence[int]) -> list[MixtureStage]:
    """All sources in turn, each until its sequences are used up: validation, which no weight changes."""
    stages, begin, before = [], 0, 0
    for count in sorted({count for count in counts if count} or {0}):
        shares = tuple(int(other >= count) for other in counts)
        stages.append(MixtureStage(begin, shares))
        begin += sum(shares) * (count - before)
        before = count
    return stages
