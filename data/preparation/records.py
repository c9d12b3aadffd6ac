"""What a preparation was asked for and what came of it: `preparation.json` and the summary."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from data.manifest import Manifest
from data.preparation.requests import Record, Request

REJECTED_NAME = "rejected.jsonl"
SHOWN_REJECTIONS = 5
# Reasons that are no fault of the input; all others are malformed input.
EMPTY, TOO_SHORT, DUPLICATE = "empty", "too short", "duplicate"
HARMLESS_REASONS = (EMPTY, TOO_SHORT, DUPLICATE)


class PreparationRequest(Request):
    """Everything that the shards depend on."""

    text_field: str = Field(..., description="Field or column with the text.")
    on_malformed: Literal["fail", "skip"] = Field(..., description="What was done about malformed input.")
    min_tokens: int = Field(..., description="Documents of fewer tokens are left out.")
    shuffle_documents: int | None = Field(..., description="Seed of the order of documents; none: that of the input.")
    remove_duplicates: bool = Field(..., description="Whether documents with equal text were left out.")

    def is_continued_by(self, other: Self) -> bool:
        """Says whether finished work of this request serves another: equal, or only malformed input is now skipped.

        Args:
            other: The later request.
        """
        return other in (self, self.model_copy(update={"on_malformed": "skip"}))


class RejectedDocument(BaseModel):
    """A line of `rejected.jsonl`: malformed input that was skipped."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str = Field(..., description="Input file.")
    line: int = Field(..., description="Line or row in it.")
    reason: str = Field(..., description="What it was counted as.")
    message: str = Field(..., description="What is wrong with it, and the fix.")


class SplitCounts(BaseModel):
    """Counters of a split."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text_bytes: int = Field(default=0, ge=0, description="Bytes, in UTF-8, of all documents in the shards.")
    rejected: dict[str, int] = Field(default_factory=dict, description="Number of rejected documents by reason.")


class SplitStatistics(SplitCounts):
    """Counters of a complete split."""

    documents: int = Field(..., ge=1, description="Number of documents.")
    tokens: int = Field(..., ge=1, description="Number of tokens, without end-of-text tokens.")
    shards: int = Field(..., ge=1, description="Number of shards.")


class PreparationRecord(Record):
    """Contents of `preparation.json`."""

    request: PreparationRequest = Field(..., description="What was asked for.")
    statistics: dict[str, SplitStatistics] = Field(default_factory=dict, description="By split; none until complete.")


@dataclass(frozen=True)
class PreparationSummary:
    """What lies in the output directory.

    Attributes:
        output: The directory.
        manifests: The splits' manifests by name.
        statistics: Their counters.
        already_prepared: Whether an earlier run had made it.
        first_malformed: Messages about the first malformed pieces of input that were skipped.
    """

    output: Path
    manifests: dict[str, Manifest]
    statistics: dict[str, SplitStatistics]
    already_prepared: bool
    first_malformed: tuple[str, ...]

    @property
    def rejected(self) -> dict[str, int]:
        """Number of rejected documents by reason, over all splits."""
        total: dict[str, int] = {}
        for statistics in self.statistics.values():
            for reason, count in statistics.rejected.items():
                total[reason] = total.get(reason, 0) + count
        return dict(sorted(total.items()))

    def __str__(self) -> str:
        """Sums up in a few lines."""
        lines = [f"already prepared: {self.output}" if self.already_prepared else f"prepared: {self.output}"]
        for split, counts in self.statistics.items():
            shards = f"{counts.shards:,} shard{'s' * (counts.shards != 1)}"
            ratio = f"{counts.text_bytes / counts.tokens:.3f} bytes per token"
            lines.append(f"  {split}: {counts.documents:,} documents, {counts.tokens:,} tokens, {ratio}, {shards}")
        if rejected := self.rejected:
            counted = ", ".join(f"{count:,} {reason}" for reason, count in rejected.items())
            lines.append(f"  rejected documents: {counted}")
        lines += [f"    {message}" for message in self.first_malformed]
        if self.first_malformed:
            lines.append(f"    all of them: {self.output / REJECTED_NAME}")
        return "\n".join(lines)
