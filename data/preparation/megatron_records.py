"""What an import was asked for and what came of it: `preparation.json` and the summary."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from data.errors import DataError
from data.preparation.inputs import InputRecord
from data.preparation.megatron_shards import EndOfText
from data.preparation.records import RECORD_NAME


class ImportRequest(BaseModel):
    """Everything that the shards depend on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["megatron"] = Field(default="megatron", description="What the shards were made from.")
    format_version: int = Field(..., description="Version of the shard layout.")
    tokenizer_fingerprint: str = Field(..., description="SHA-256 of the tokenizer file.")
    inputs: tuple[InputRecord, ...] = Field(..., description="Files of the datasets given as --input.")
    validation_inputs: tuple[InputRecord, ...] = Field(..., description="Those given as --validation-input.")
    validation_fraction: float = Field(..., description="Share of documents that go to validation.")
    shard_tokens: int = Field(..., description="Tokens after which a shard ends.")
    end_of_text: EndOfText = Field(..., description="What was done with an end of text that ends a document.")

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return ("train", "validation") if self.validation_inputs or self.validation_fraction else ("train",)


class ImportStatistics(BaseModel):
    """Counters of a split."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    documents: int = Field(..., ge=1, description="Number of documents.")
    tokens: int = Field(..., ge=1, description="Number of tokens.")
    shards: int = Field(..., ge=1, description="Number of shards.")
    empty_documents: int = Field(..., ge=0, description="Documents without a token, which were left out.")
    stripped_tokens: int = Field(..., ge=0, description="End-of-text tokens at the ends of documents, left out.")


class ImportRecord(BaseModel):
    """Contents of `preparation.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

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


def read_import_record(directory: Path) -> ImportRecord | None:
    """Reads `preparation.json`.

    Args:
        directory: Where it is.

    Returns:
        Its content, or nothing if there is none of an import.
    """
    try:
        return ImportRecord.model_validate_json((directory / RECORD_NAME).read_bytes())
    except (OSError, pydantic.ValidationError):
        return None


def check_same_request(output: Path, request: ImportRequest) -> ImportRecord | None:
    """Reads the record of an existing output.

    Args:
        output: The directory.
        request: What is asked for now.

    Returns:
        Its record, or nothing if the directory is empty or does not exist.

    Raises:
        DataError: It holds something else.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    record = read_import_record(output)
    if record is None:
        raise DataError(f"output {output} exists and was not made by this command; give another --output")
    if record.request != request:
        before, now = record.request.model_dump(), request.model_dump()
        changed = [name for name in now if before[name] != now[name]]
        raise DataError(
            f"output {output} was imported from something else ({', '.join(changed)} differ); "
            "give another --output, or delete it first"
        )
    return record
