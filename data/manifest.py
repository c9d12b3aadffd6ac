"""The manifest of a split: everything a reader needs to know about its shards without opening them."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Self, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

from data.errors import DataError
from data.files import write_atomically

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1
DTYPES = {"uint16": 2, "uint32": 4}

Model = TypeVar("Model", bound=BaseModel)
# Neither another folder nor, as a checksum, anything else than the name of a cached copy.
FileName = Annotated[str, Field(pattern=r"^[^/\x00]+$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FileBytes = Annotated[int, Field(ge=1, lt=2**63)]


class ShardRecord(BaseModel):
    """One shard: a tar of samples, and a sidecar with the lengths of its documents."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: FileName = Field(..., description="Name of the tar, beside the manifest.")
    documents: int = Field(..., ge=1, description="Number of documents.")
    tokens: int = Field(..., ge=1, description="Number of tokens of all documents, without end-of-text tokens.")
    bytes: FileBytes = Field(..., description="Size of the tar.")
    sha256: Sha256 = Field(..., description="Checksum of the tar.")
    lengths_file: FileName = Field(..., description="Name of the .npy with the number of tokens of each document.")
    lengths_bytes: FileBytes = Field(..., description="Size of that file.")
    lengths_sha256: Sha256 = Field(..., description="Checksum of that file.")
    sample_offsets: tuple[NonNegativeInt, ...] = Field(
        ..., min_length=1, description="Byte in the tar where the tokens of each sample start."
    )
    sample_tokens: tuple[PositiveInt, ...] = Field(..., min_length=1, description="Number of tokens of each sample.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        offsets, tokens = self.sample_offsets, self.sample_tokens
        if len(offsets) != len(tokens):
            raise ValueError(f"sample_offsets has {len(offsets)} entries and sample_tokens {len(tokens)}")
        if sum(tokens) != self.tokens:
            raise ValueError(f"sample_tokens adds up to {sum(tokens)}, tokens is {self.tokens}")
        if list(offsets) != sorted(set(offsets)) or offsets[-1] >= self.bytes:
            raise ValueError(f"sample_offsets does not rise within the {self.bytes} bytes of {self.file}")
        return self


class Manifest(BaseModel):
    """A split: its tokenizer and its shards."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int = Field(..., description="Version of this layout.")
    tokenizer_file: str = Field(..., description="Name of the tokenizer's copy in the directory above.")
    tokenizer_fingerprint: str = Field(..., description="SHA-256 of the tokenizer file.")
    vocab_size: int = Field(..., ge=1, description="One more than the largest token id.")
    eos_id: int = Field(..., ge=0, description="Token that packing puts after each document.")
    dtype: str = Field(..., description="Type of the stored tokens, uint16 or uint32, little endian.")
    shards: tuple[ShardRecord, ...] = Field(..., description="The shards, in the order of the input.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.eos_id >= self.vocab_size:
            raise ValueError(f"eos_id {self.eos_id} is outside the vocabulary of {self.vocab_size}")
        # An unknown type is another error than one that is too small.
        if self.vocab_size > 2 ** (8 * DTYPES.get(self.dtype, 8)):
            raise ValueError(f"dtype {self.dtype} does not hold the ids of a vocabulary of {self.vocab_size}")
        names = Counter(name for shard in self.shards for name in (shard.file, shard.lengths_file))
        name, times = max(names.items(), key=lambda item: item[1], default=("", 1))
        if times > 1:
            raise ValueError(f"{name} is listed {times} times")
        return self

    @property
    def documents(self) -> int:
        """Number of documents in the split."""
        return sum(shard.documents for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Number of tokens in the split, without end-of-text tokens."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Identity of the content: equal for equal documents and tokenizer, wherever the files lie."""
        identity = [self.format_version, self.tokenizer_fingerprint, self.dtype]
        shards = [[shard.sha256, shard.lengths_sha256] for shard in self.shards]
        return hashlib.sha256(json.dumps([identity, shards]).encode()).hexdigest()


def dtype_for(vocab_size: int) -> str:
    """Names the smallest stored type that holds every token id.

    Args:
        vocab_size: One more than the largest token id.

    Returns:
        `uint16` or `uint32`.
    """
    return "uint16" if vocab_size <= 2**16 else "uint32"


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Writes `manifest.json` atomically.

    Args:
        directory: The split's directory.
        manifest: What to write.
    """
    write_atomically(directory / MANIFEST_NAME, manifest.model_dump_json(indent=1).encode())


def read_manifest(directory: Path) -> Manifest:
    """Reads and checks the manifest of a split.

    Args:
        directory: The split's directory.

    Returns:
        The manifest.

    Raises:
        DataError: It is missing, damaged, of another version, or has an unknown dtype.
    """
    path = directory / MANIFEST_NAME
    if not path.is_file():
        raise DataError(f"{directory} holds no {MANIFEST_NAME}; make the shards with tools/prepare_data.py")
    return parse_manifest(path)


def parse_manifest(path: Path) -> Manifest:
    """Reads and checks a manifest, whatever its file is called.

    Args:
        path: The file.

    Returns:
        The manifest.

    Raises:
        DataError: It is damaged, of another version, names no shard, or has an unknown dtype.
    """
    manifest = parse_model(Manifest, path)
    if manifest.format_version != FORMAT_VERSION:
        raise DataError(
            f"{path} has format version {manifest.format_version}, this code reads {FORMAT_VERSION}; "
            "prepare the data again with tools/prepare_data.py"
        )
    if manifest.dtype not in DTYPES:
        raise DataError(
            f"{path} has dtype {manifest.dtype!r}, only {' and '.join(DTYPES)} are known; "
            "prepare the data again with tools/prepare_data.py"
        )
    if not manifest.shards:
        raise DataError(f"{path} names no shard; prepare the data again with tools/prepare_data.py")
    return manifest


def parse_model(model: type[Model], path: Path) -> Model:
    """Reads a JSON file into a pydantic model.

    Args:
        model: Class to read into.
        path: JSON file.

    Returns:
        The checked object.

    Raises:
        DataError: The file does not fit the class.
    """
    try:
        return model.model_validate_json(path.read_bytes())
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole file"
        raise DataError(
            f"{path} is damaged ({where}: {first['msg'].removeprefix('Value error, ')}); prepare the data again with "
            "tools/prepare_data.py"
        ) from None
