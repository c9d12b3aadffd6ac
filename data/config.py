"""Settings of the sequence stream."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field


class DataConfig(BaseModel):
    """Where the prepared shards are, how documents are padded into blocks and how sequences are ordered."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Path = Field(
        ...,
        description="Directory made by tools/prepare_data.py: train/ and validation/ with shards, and the tokenizer.",
    )
    tokenizer: Path | None = Field(
        default=None,
        description="Tokenizer file (.model or tokenizer.json) that the shards must have been made with; "
        "by default the copy inside `path`.",
    )
    random_left_padding: bool = Field(
        default=True,
        description="Start each document with 0 to block_length-1 masked pads, drawn uniformly.",
    )
    pad_to_block_boundary: bool = Field(
        default=True,
        description="Fill the last block of each document with masked pads, so that no block mixes two documents.",
    )
    shuffle: bool = Field(
        default=True, description="Shuffle the training sequences; validation is always read in order."
    )
    shuffle_window_shards: int = Field(
        default=8, ge=1, description="Sequences are shuffled within a window of this many (already shuffled) shards."
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of the data order and of the padding draws.")
