"""Measurements in a CSV file, to which each is added as soon as it is made: an interrupted study goes on."""

import contextlib
import csv
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from evaluation.throughput.measurement import Measurement
from inference.errors import InferenceError
from parallel.config import ModelConfig
from parallel.device_limits import DeviceLimits


@dataclass(frozen=True)
class Point:
    """What identifies a measurement.

    Attributes:
        model: name.
        settings: digest of its settings, so that those of another model of the same name are not taken for its own.
        device: name of the device.
        dtype: type of weights and caches.
        prompt_tokens: of each sequence.
        new_tokens: of each sequence.
        batch_size: sequences at a time.
    """

    model: str
    settings: str
    device: str
    dtype: str
    prompt_tokens: int
    new_tokens: int
    batch_size: int


def digest_of(model: ModelConfig) -> str:
    """What a Point knows of a model's settings."""
    return hashlib.sha256(model.model_dump_json().encode()).hexdigest()[:12]


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
        InferenceError: it is something else, or cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.records: dict[Point, Record] = {}
        with _explained(path):
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        self._is_new = not lines
        # A line without an end was cut off when the study was interrupted: measured again.
        self._is_cut = bool(lines) and not lines[-1].endswith("\n")
        if lines:
            for record in _read(path, lines[:-1] if self._is_cut else lines):
                self.records[record.point] = record

    def add(self, record: Record) -> None:
        """Appends a record.

        Raises:
            InferenceError: the file cannot be written.
        """
        self.records[record.point] = record
        with _explained(self._path), open(self._path, "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, _COLUMNS)
            if self._is_cut:
                file.write("\n")
            if self._is_new:
                writer.writeheader()
            writer.writerow(_row(record))
        self._is_new = self._is_cut = False

    def on(self, limits: DeviceLimits, models: Mapping[str, ModelConfig]) -> list[Record]:
        """Those of one device and type of values; of models that are named, only those of these settings."""
        digests = {name: digest_of(model) for name, model in models.items()}
        return [
            record
            for point, record in self.records.items()
            if (point.device, point.dtype) == (limits.device, limits.dtype)
            and point.settings == digests.get(point.model, point.settings)
        ]


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it holds no text"
        raise InferenceError(f"{path} cannot be used for measurements: {reason}; name another --output") from None


def _row(record: Record) -> dict[str, object]:
    measured = record.measurement
    row: dict[str, object] = {**asdict(record.point), "status": OUT_OF_MEMORY if measured is None else "measured"}
    if measured is not None:
        row |= asdict(measured) | {name: getattr(measured, name) for name in _DERIVED}
    return row


def _read(path: Path, lines: list[str]) -> Iterable[Record]:
    reader = csv.DictReader(lines)
    if reader.fieldnames != _COLUMNS:
        raise InferenceError(
            f"{path} is not a file of measurements of this version; move it away, or name another --output"
        )
    for row in reader:
        try:
            yield _record(row)
        except (TypeError, ValueError):
            continue  # cut off in an earlier interruption: measured again behind it


def _record(row: dict[str, str]) -> Record:
    whole = {name: int(row[name]) for name in ("prompt_tokens", "new_tokens", "batch_size")}
    point = Point(row["model"], row["settings"], row["device"], row["dtype"], **whole)
    if row["status"] == OUT_OF_MEMORY:
        return Record(point, None)
    values = {field.name: (int if field.type is int else float)(row[field.name]) for field in _MEASURED}
    return Record(point, Measurement(**whole, **values))  # type: ignore[arg-type]
