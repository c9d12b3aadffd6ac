"""Measurements in a CSV file, to which each is added as soon as it is made: an interrupted study goes on."""

import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from evaluation.throughput.measurement import Measurement
from inference.errors import InferenceError


@dataclass(frozen=True)
class Point:
    """What identifies a measurement.

    Attributes:
        model: name.
        device: name of the device.
        dtype: type of weights and caches.
        prompt_tokens: of each sequence.
        new_tokens: of each sequence.
        batch_size: sequences at a time.
    """

    model: str
    device: str
    dtype: str
    prompt_tokens: int
    new_tokens: int
    batch_size: int


@dataclass(frozen=True)
class Record:
    """A point and what was measured there; None if it did not fit into memory."""

    point: Point
    measurement: Measurement | None


OUT_OF_MEMORY = "out of memory"
_MEASURED = [field for field in fields(Measurement) if field.name not in Point.__dataclass_fields__]
_DERIVED = ("tokens_per_second", "decoding_tokens_per_second")
_COLUMNS = [field.name for field in fields(Point)] + ["status", *_DERIVED, *(field.name for field in _MEASURED)]


class RecordFile:
    """All records of a CSV file.

    Args:
        path: the file; it need not exist.

    Raises:
        InferenceError: it is something else.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.records: dict[Point, Record] = {}
        if path.exists():
            for record in _read(path):
                self.records[record.point] = record

    def add(self, record: Record) -> None:
        """Appends a record."""
        self.records[record.point] = record
        is_new = not self._path.exists()
        with open(self._path, "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, _COLUMNS)
            if is_new:
                writer.writeheader()
            writer.writerow(_row(record))


def _row(record: Record) -> dict[str, object]:
    measured = record.measurement
    row: dict[str, object] = {**asdict(record.point), "status": OUT_OF_MEMORY if measured is None else "measured"}
    if measured is not None:
        row |= asdict(measured) | {name: getattr(measured, name) for name in _DERIVED}
    return row


def _read(path: Path) -> Iterable[Record]:
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != _COLUMNS:
            raise InferenceError(f"{path} is not a file of this tool's measurements; name another --output")
        for row in reader:
            try:
                yield _record(row)
            except (TypeError, ValueError):
                continue  # cut off when the study was interrupted: measured again


def _record(row: dict[str, str]) -> Record:
    whole = {name: int(row[name]) for name in ("prompt_tokens", "new_tokens", "batch_size")}
    point = Point(row["model"], row["device"], row["dtype"], **whole)
    if row["status"] == OUT_OF_MEMORY:
        return Record(point, None)
    values = {field.name: (int if field.type is int else float)(row[field.name]) for field in _MEASURED}
    return Record(point, Measurement(**whole, **values))  # type: ignore[arg-type]
