"""What every command that makes shards is asked for, and the checks that all of them need."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field

from data.errors import DataError
from data.preparation.inputs import InputRecord


class Request(BaseModel):
    """What the shards depend on, however they are made."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int = Field(..., description="Version of the shard layout.")
    tokenizer_fingerprint: str = Field(..., description="SHA-256 of the tokenizer file.")
    inputs: tuple[InputRecord, ...] = Field(..., description="Files given as --input.")
    validation_inputs: tuple[InputRecord, ...] = Field(..., description="Files given as --validation-input.")
    validation_fraction: float = Field(..., description="Share of documents that go to validation.")
    shard_tokens: int = Field(..., description="Tokens after which a shard ends.")

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return ("train", "validation") if self.validation_inputs or self.validation_fraction else ("train",)

    def is_continued_by(self, other: Self) -> bool:
        """Says whether finished work of this request serves another.

        Args:
            other: The later request.
        """
        return other == self

    def differences(self, other: Self) -> str:
        """Names the fields that differ.

        Args:
            other: Another request of the same kind.
        """
        before, now = self.model_dump(), other.model_dump()
        return ", ".join(name for name in now if before[name] != now[name])


class Record(BaseModel):
    """Contents of `preparation.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    request: Request = Field(..., description="What was asked for.")


def check_validation_options(validation_inputs: Sequence[Path], validation_fraction: float) -> None:
    """Checks where the validation split comes from.

    Args:
        validation_inputs: What is given as --validation-input.
        validation_fraction: What is given as --validation-fraction.

    Raises:
        DataError: Both are given, or the fraction is none.
    """
    if validation_inputs and validation_fraction:
        raise DataError("--validation-input and --validation-fraction exclude each other; give one of them")
    if not 0 <= validation_fraction < 1:
        raise DataError(f"--validation-fraction {validation_fraction} must be at least 0 and below 1")


def check_at_least(options: object, minimums: dict[str, int]) -> None:
    """Checks the whole numbers among options.

    Args:
        options: An object with them.
        minimums: By name, the smallest value; None is no value.

    Raises:
        DataError: One is too small.
    """
    for name, minimum in minimums.items():
        value = getattr(options, name)
        if value is not None and value < minimum:
            raise DataError(f"--{name.replace('_', '-')} {value} must be at least {minimum}")
