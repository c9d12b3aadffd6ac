"""Finds input files and tells them apart."""

import glob
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from data.errors import DataError

# Stands in each directory that was prepared.
RECORD_NAME = "preparation.json"
COMPRESSIONS = (".xz", ".gz", ".zst")
FORMATS = (".txt", ".jsonl", ".parquet")
# Files up to this size are hashed whole, of larger ones as many bytes in evenly spaced blocks.
HASHED_BYTES = 2**24
HASHED_BLOCKS = 16


class InputRecord(BaseModel):
    """Identity of an input file, wherever it lies."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(..., description="File name without folder.")
    bytes: int = Field(..., description="Size.")
    checksum: str = Field(..., description="SHA-256 of the content, of files above 16 MiB only of 16 blocks of 1 MiB.")


@dataclass(frozen=True)
class FoundInputs:
    """What a user means.

    Attributes:
        files: In the order of the patterns, those of one pattern sorted.
        left_out: By ending, the number of files in directories that are of unknown kinds.
    """

    files: tuple[Path, ...]
    left_out: Counter[str]


def expand_inputs(patterns: Sequence[Path], option: str, output: Path | None = None) -> FoundInputs:
    """Finds the files that a user means.

    Args:
        patterns: Files, glob patterns (`**` goes through folders) and directories, which are searched for files of
            known kinds, hidden ones left out.
        option: Name of the option, for messages.
        output: Directory to make, if any; if it has been made, what is found in it does not count.

    Returns:
        The files.

    Raises:
        DataError: Nothing is found, or a file is of an unknown kind or cannot be read.
    """
    made = output if output and (output / RECORD_NAME).is_file() else None
    files: list[Path] = []
    left_out: Counter[str] = Counter()
    for pattern in patterns:
        found = list(_expand(pattern, made, left_out))
        if not found:
            endings = ", ".join(FORMATS)
            raise DataError(f"{option} {pattern} finds no file that ends in {endings} (or these with .xz, .gz, .zst)")
        files += found
    for path in files:
        check_input_path(path)
    return FoundInputs(tuple(files), left_out)


def _expand(pattern: Path, output: Path | None, left_out: Counter[str]) -> Iterator[Path]:
    if pattern.is_dir():
        yield from sorted(_files_within(pattern, output, left_out))
    elif pattern.exists() or not glob.has_magic(str(pattern)):
        yield pattern
    else:
        for name in sorted(glob.glob(str(pattern), recursive=True)):
            path = Path(name)
            if not path.is_dir() and not (output and path.resolve().is_relative_to(output.resolve())):
                yield path


def _files_within(directory: Path, output: Path | None, left_out: Counter[str]) -> Iterator[Path]:
    for folder, folders, names in os.walk(directory, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if output:
            folders[:] = [name for name in folders if not Path(folder, name).samefile(output)]
        for name in names:
            path = Path(folder, name)
            if name.startswith("."):
                continue
            if _kind(path) in FORMATS:
                yield path
            else:
                left_out[path.suffix or "no ending"] += 1


def check_no_file_twice(paths: Iterable[Path]) -> None:
    """Refuses inputs that name one file twice, also through links.

    Args:
        paths: Existing files.

    Raises:
        DataError: Two of them are the same file.
    """
    seen: dict[tuple[int, int], Path] = {}
    for path in paths:
        status = path.stat()
        first = seen.setdefault((status.st_dev, status.st_ino), path)
        if first is not path:
            raise DataError(f"input file {path} is given twice (as {first}, too); name it once")


def check_input_path(path: Path) -> str:
    """Checks that a path can be an input, without reading it.

    Args:
        path: The input file.

    Returns:
        `.txt`, `.jsonl` or `.parquet`.

    Raises:
        DataError: The path is no readable file or has an unknown ending.
    """
    if not path.exists():
        raise DataError(f"input file {path} does not exist; check the path")
    if not path.is_file():
        raise DataError(f"input {path} is not a file; name the files in it instead, for example {path}/*.jsonl")
    if not os.access(path, os.R_OK):
        raise DataError(f"input file {path} cannot be read; change its permissions")
    kind = _kind(path)
    if kind not in FORMATS:
        raise DataError(
            f"input file {path} is of an unknown kind; its name must end in .txt, .jsonl or .parquet, "
            "optionally followed by .xz, .gz or .zst"
        )
    return kind


def _kind(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return suffixes[-2] if len(suffixes) > 1 and suffixes[-1] in COMPRESSIONS else path.suffix.lower()


def identify(path: Path) -> InputRecord:
    """Describes a file by its name, its size and a checksum that does not take reading a terabyte.

    Args:
        path: The file.

    Returns:
        Its identity.

    Raises:
        DataError: Its path is not UTF-8 and cannot stand in a record.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise DataError(f"input file {str(path)!a} has a name that is not UTF-8; rename it") from None
    size = path.stat().st_size
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if size <= HASHED_BYTES:
            digest.update(file.read())
        else:
            block = HASHED_BYTES // HASHED_BLOCKS
            for number in range(HASHED_BLOCKS):
                file.seek((size - block) * number // (HASHED_BLOCKS - 1))
                digest.update(file.read(block))
    return InputRecord(name=path.name, bytes=size, checksum=digest.hexdigest())
