"""What an import was asked for and what came of it: `preparation.json` and the summary."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from data.preparation.megatron_shards import EndOfText
from data.preparation.requests import Record, Request


class ImportRequest(Request):
    """Everything that the shards depend on; the inputs are all files of the datasets."""

    kind: Literal["megatron"] = Field(default="megatron", description="What the shards were made from.")
    end_of_text: EndOfText = Field(..., description="What was done with an end of text that ends a document.")


class ImportStatistics(BaseModel):
    """Counters of a split."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    documents: int = Field(..., ge=1, description="Number of documents.")
    tokens: int = Field(..., ge=1, description="Number of tokens.")
    shards: int = Field(..., ge=1, description="Number of shards.")
    empty_documents: int = Field(..., ge=0, description="Documents without a token, which were left out.")
    stripped_tokens: int = Field(..., ge=0, description="End-of-text tokens at the ends of documents, left out.")


class ImportRecord(Record):
    """Contents of `preparation.json`."""

    request: ImportRequest = Field(..., description="What was asked for.")
    statistics: dict[str, ImportStatistics] = Field(default_factory=dict, description="By split; none until complete.")


@dataclass(frozen=True)
class ImportSummary:
    """What lies in the output directory.

    Attributes:
        output: The directory.
        statistics: Counters by split.
        already_prepared: Whether an earlier run had made it.
    """

    output: Path
    statistics: dict[str, ImportStatistics]
    already_prepared: bool

    def __str__(self) -> str:
        """Sums up in a few lines."""
        lines = [f"already prepared: {self.output}" if self.already_prepared else f"prepared: {self.output}"]
        for split, counts in self.statistics.items():
            shards = f"{counts.shards:,} shard{'s' * (counts.shards != 1)}"
            lines.append(f"  {split}: {counts.documents:,} documents, {counts.tokens:,} tokens, {shards}")
            given = counts.documents + counts.empty_documents
            lines.append(
                f"    {counts.stripped_tokens:,} of {given:,} documents gave up their end of text, "
                f"{counts.empty_documents:,} empty ones were left out"
            )
        return "\n".join(lines)
