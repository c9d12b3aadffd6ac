"""What a stream of sequences is made of: a checkpoint records it, and a resumed run compares."""

from collections.abc import Iterator

from pydantic import BaseModel, ConfigDict, Field


class SourceIdentity(BaseModel):
    """One corpus and its padding."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shards: str = Field(..., description="Fingerprint of its shards and their tokenizer.")
    tokenizer: str = Field(..., description="Fingerprint of the tokenizer alone.")
    random_left_padding: bool = Field(..., description="Whether documents begin with random pads.")
    pad_to_block_boundary: bool = Field(..., description="Whether the last block of each document is filled.")


class StageIdentity(BaseModel):
    """The shares of the sources from a position on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    begin: int = Field(..., description="First position.")
    shares: dict[str, int] = Field(..., description="Sequences of each source in a repeating pattern; none has 0.")


class StreamIdentity(BaseModel):
    """Everything that decides what the sequences are and in which order they come; some hundred bytes as JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    versions: tuple[int, ...] = Field(..., description="Versions of packing, order and mixture.")
    block_length: int = Field(..., description="Tokens per block.")
    sequence_length: int = Field(..., description="Tokens per sequence.")
    isolate_documents: bool = Field(..., description="Whether documents are kept apart.")
    seed: int | None = Field(..., description="Seed of order and padding; None if nothing is drawn.")
    shuffle_window_shards: int | None = Field(..., description="Shards of a shuffle window; None without shuffling.")
    sources: dict[str, SourceIdentity] = Field(..., description="The corpora by name.")
    stages: tuple[StageIdentity, ...] = Field(..., description="When they are read in which shares.")

    def differences(self, recorded: "StreamIdentity", position: int) -> list[str]:
        """Compares the sources and stages with those that a run has read so far.

        Stages that begin at or behind the position are free to differ, and names of sources do not matter.

        Args:
            recorded: What the run recorded.
            position: How far it has read.

        Returns:
            Sentences that each name one difference; a new stage could bring each about.
        """
        return list(self._stage_differences(recorded, position))

    def general_differences(self, recorded: "StreamIdentity") -> list[str]:
        """Compares what holds for all stages.

        Args:
            recorded: What a run recorded.

        Returns:
            Sentences that each name one difference; no stage could bring these about.
        """
        sentences = []
        for name in type(self).model_fields:
            there, here = getattr(recorded, name), getattr(self, name)
            # Where nothing was drawn so far, a seed that a later stage draws from changes nothing.
            unused = name == "seed" and None in (there, here)
            if name not in ("sources", "stages") and there != here and not unused:
                sentences.append(f"{name.replace('_', ' ')} was {there} and is {here}")
        return sentences

    def _stage_differences(self, recorded: "StreamIdentity", position: int) -> Iterator[str]:
        there, here = recorded.until(position), self.until(position)
        if [stage.begin for stage in there] != [stage.begin for stage in here]:
            begins = [[f"{stage.begin:,}" for stage in stages] for stages in (there, here)]
            yield f"stages began at sequence {' and '.join(begins[0])}, and now at {' and '.join(begins[1])}"
            return
        for before, now in zip(there, here, strict=True):
            yield from self._shares_differences(recorded, before, now)

    def _shares_differences(
        self, recorded: "StreamIdentity", before: StageIdentity, now: StageIdentity
    ) -> Iterator[str]:
        there = [(recorded.sources[name], share) for name, share in before.shares.items()]
        here = [(self.sources[name], share) for name, share in now.shares.items()]
        if there == here:
            return
        if [share for _, share in there] != [share for _, share in here]:
            yield f"the shares from sequence {now.begin:,} on were {before.shares} and are {now.shares}"
            return
        if sorted(there, key=str) == sorted(here, key=str):
            yield f"the sources from sequence {now.begin:,} on have other names, which come in another order"
            return
        for name, (old, _), (new, _) in zip(now.shares, there, here, strict=True):
            yield from _source_differences(name, old, new)

    def until(self, position: int) -> list[StageIdentity]:
        """The stages of which something was read before a position."""
        return [stage for stage in self.stages if stage.begin < position]


def _source_differences(name: str, old: SourceIdentity, new: SourceIdentity) -> Iterator[str]:
    if old.tokenizer != new.tokenizer:
        yield f"source {name} was made with the tokenizer {old.tokenizer}, now it is {new.tokenizer}"
    elif old.shards != new.shards:
        yield f"the shards of source {name} had the fingerprint {old.shards}, now it is {new.shards}"
    for field in ("random_left_padding", "pad_to_block_boundary"):
        if getattr(old, field) != getattr(new, field):
            yield f"{field} of source {name} was {getattr(old, field)} and is {getattr(new, field)}"
