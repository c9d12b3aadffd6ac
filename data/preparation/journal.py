"""An append-only file of durable records, of which a kill can at most tear the last."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Generic, TypeVar

import pydantic
from pydantic import BaseModel

from data.files import write_atomically

Entry = TypeVar("Entry", bound=BaseModel)


class Journal(Generic[Entry]):
    """A file with one JSON object a line."""

    def __init__(self, path: Path, model: type[Entry]) -> None:
        """Names the file, which need not exist.

        Args:
            path: The file.
            model: Class of its entries.
        """
        self._path = path
        self._model = model

    def read(self) -> list[Entry]:
        """Reads the entries up to the one that was being written when a run was killed."""
        if not self._path.is_file():
            return []
        entries = []
        for line in self._path.read_bytes().splitlines():
            try:
                entries.append(self._model.model_validate_json(line))
            except pydantic.ValidationError:
                break
        return entries

    def rewrite(self, entries: Iterable[Entry]) -> None:
        """Replaces the content.

        Args:
            entries: What to keep.
        """
        write_atomically(self._path, b"".join(_line(entry) for entry in entries))

    def append(self, entry: Entry) -> None:
        """Adds an entry, which is on the disk when this returns.

        Args:
            entry: What to add.
        """
        with open(self._path, "ab") as file:
            file.write(_line(entry))
            file.flush()
            os.fsync(file.fileno())


def _line(entry: BaseModel) -> bytes:
    return entry.model_dump_json().encode() + b"\n"


def has_size(path: Path, size: int) -> bool:
    """Says whether a file exists with this size.

    Args:
        path: The file.
        size: Bytes.
    """
    return path.is_file() and path.stat().st_size == size
