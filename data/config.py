"""Settings of the sequence stream."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

# What a corpus is called that is given by `path` alone.
ONLY_SOURCE = "corpus"
LOCATION = "a directory made by tools/prepare_data.py or tools/import_megatron.py, or where its files can be fetched: "
LOCATION += "http(s)://, s3://, gs://, or `pipe:` and a command in which {file} stands for a file's name"


def _as_text(location: Any) -> Any:
    return str(location) if isinstance(location, Path) else location


Location = Annotated[str, BeforeValidator(_as_text)]


class CacheConfig(BaseModel):
    """Local copies of shards that lie elsewhere, shared by the processes of a node."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    directory: Path | None = Field(
        default=None,
        description="Folder on a local disk; copies go to block-transformer-cache in it, by default to "
        "block-transformer in the user's cache ($XDG_CACHE_HOME or ~/.cache).",
    )
    gibibytes: float = Field(
        default=64.0,
        gt=0,
        description="Largest size of the copied shards; what was read longest ago goes first. Manifests, tokenizers "
        "and counts, a few megabytes for each corpus, are kept beside them and do not count.",
    )
    prefetch_shards: int = Field(default=8, ge=0, description="Shards fetched ahead of the one that is read.")
    attempts: int = Field(
        default=8, ge=1, description="Attempts to fetch a file; between them 1, 2, 4, ... seconds, at most a minute."
    )
    stall_seconds: float = Field(
        default=60.0, gt=0, description="A transfer that brings no byte for this long is broken off and begun again."
    )


class SourceConfig(BaseModel):
    """One corpus of a mixture."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    path: Location = Field(..., min_length=1, description=f"The corpus: {LOCATION}.")
    weight: float = Field(
        default=1.0,
        ge=0,
        description="Share of the sequences, relative to the other sources; 0 = only in a later stage.",
    )
    validation: bool = Field(default=True, description="Whether its validation split is read; then it must have one.")
    random_left_padding: bool | None = Field(
        default=None, description="As `data.random_left_padding`, for this source alone."
    )
    pad_to_block_boundary: bool | None = Field(
        default=None, description="As `data.pad_to_block_boundary`, for this source alone."
    )


class StageConfig(BaseModel):
    """From a point of the training on, other shares of the sources."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    from_tokens: int = Field(
        ..., ge=1, description="Where the stage begins: tokens of training before it, padded slots included."
    )
    weights: dict[str, float] = Field(
        ..., description="Weight of each source in it; sources that are not named pause, and go on where they stopped."
    )


class DataConfig(BaseModel):
    """Where the prepared shards are, how documents are padded into blocks and how sequences are ordered."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Location | None = Field(default=None, min_length=1, description=f"The corpus: {LOCATION}. Or give `sources`.")
    sources: dict[str, SourceConfig] = Field(
        default={}, description="Instead of `path`: several corpora by name, mixed by weight."
    )
    stages: tuple[StageConfig, ...] = Field(
        default=(), description="Later changes of the weights, in order; the first stage is that of the sources."
    )
    tokenizer: Path | None = Field(
        default=None,
        description="Tokenizer file (.model or tokenizer.json) that the shards must have been made with; "
        "by default the copy beside them.",
    )
    random_left_padding: bool = Field(
        default=True,
        description="Start each document with 0 to block_length-1 masked pads, drawn uniformly.",
    )
    pad_to_block_boundary: bool = Field(
        default=True,
        description="Fill the last block of each document with masked pads, so that no block mixes two documents.",
    )
    isolate_documents: bool = Field(
        default=False,
        description="Attend only within a document, and predict no block from the document before it; needs "
        "`pad_to_block_boundary`.",
    )
    shuffle: bool = Field(
        default=True, description="Shuffle the training sequences; validation is always read in order."
    )
    shuffle_window_shards: int = Field(
        default=8, ge=1, description="Sequences are shuffled within a window of this many (already shuffled) shards."
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of the data order and of the padding draws.")
    bad_shards: Literal["fail", "skip"] = Field(
        default="fail",
        description="What a training shard that cannot be read, or holds impossible tokens, does: end the run, or be "
        "left out for good, by all ranks alike: its sequences become padding and are counted; no other one moves.",
    )
    cache: CacheConfig = Field(default=CacheConfig(), description="Copies of shards that lie elsewhere.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.path is None) == (not self.sources):
            raise ValueError("give either path, for one corpus, or sources, for several")
        _check_stages(self.sources or {ONLY_SOURCE: None}, self.stages)
        if self.sources and not any(source.weight for source in self.sources.values()):
            raise ValueError("all sources have weight 0; give at least one of them a weight")
        return self

    @property
    def corpora(self) -> dict[str, SourceConfig]:
        """The sources by name, also if there is only `path`."""
        return self.sources or {ONLY_SOURCE: SourceConfig(path=str(self.path))}

    def pads_to_block_boundary(self, source: SourceConfig) -> bool:
        """Whether the last block of each document of a source is filled."""
        own = source.pad_to_block_boundary
        return self.pad_to_block_boundary if own is None else own

    def pads_left(self, source: SourceConfig) -> bool:
        """Whether documents of a source begin with random pads."""
        own = source.random_left_padding
        return self.random_left_padding if own is None else own


def _check_stages(sources: dict[str, SourceConfig] | dict[str, None], stages: tuple[StageConfig, ...]) -> None:
    begin = 0
    for stage in stages:
        if stage.from_tokens <= begin:
            raise ValueError(f"stages must be in order: one begins at {stage.from_tokens} after one at {begin}")
        begin = stage.from_tokens
        unknown = stage.weights.keys() - sources.keys()
        if unknown:
            raise ValueError(
                f"the stage from_tokens={begin} names {', '.join(sorted(unknown))}, but the sources are "
                f"{', '.join(sources)}"
            )
        if not any(stage.weights.values()) or min(stage.weights.values()) < 0:
            raise ValueError(f"the stage from_tokens={begin} needs weights of at least 0, one of them above 0")


def is_remote(location: str) -> bool:
    """Whether the location of a corpus is a URL rather than a path."""
    return "://" in location or location.startswith("pipe:")
