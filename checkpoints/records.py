"""What the manifest of a checkpoint records: files, their checksums, and the tensor fragments inside them."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from checkpoints.errors import CheckpointError
from checkpoints.files import sha256_of, sync_file

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
KINDS = ("weight", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """Where a flat piece of one fp32 tensor lies in the global parameter.

    Attributes:
        name: Global parameter name.
        kind: ``weight``, ``exp_avg`` or ``exp_avg_sq``.
        global_shape: Shape of the whole parameter.
        split_axis: Axis that tensor parallelism splits; None if it does not.
        split_start: First row of the slice along ``split_axis``; without meaning if there is no split.
        split_stop: One past its last row.
        flat_start: First element of the piece in the row-major flattened slice.
        flat_stop: One past its last element.
    """

    name: str
    kind: str
    global_shape: tuple[int, ...]
    split_axis: int | None
    split_start: int
    split_stop: int
    flat_start: int
    flat_stop: int

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            CheckpointError: A range lies outside the parameter or the kind is unknown.
        """
        if self.kind not in KINDS:
            raise CheckpointError(f"fragment {self.name}: kind {self.kind!r} is not one of {', '.join(KINDS)}")
        axes = len(self.global_shape)
        if self.split_axis is not None and not 0 <= self.split_axis < axes:
            raise CheckpointError(f"fragment {self.name}: split_axis {self.split_axis} is not an axis of {axes}")
        if self.split_axis is not None and not 0 <= self.split_start < self.split_stop <= self._split_size():
            rows = f"{self.split_start}:{self.split_stop}"
            raise CheckpointError(f"fragment {self.name}: rows {rows} are not inside {self.global_shape}")
        if not 0 <= self.flat_start <= self.flat_stop <= self.elements:
            flat = f"{self.flat_start}:{self.flat_stop}"
            raise CheckpointError(f"fragment {self.name}: range {flat} is not inside a slice of {self.slice_shape}")

    def _split_size(self) -> int:
        return self.global_shape[self.split_axis or 0]

    @property
    def box(self) -> tuple[tuple[int, int], ...]:
        """Start and stop of the slice in the global parameter, for each axis."""
        return slice_box(self.global_shape, self.split_axis, self.split_start, self.split_stop)

    @property
    def slice_shape(self) -> tuple[int, ...]:
        """Shape of the slice that the flat range refers to."""
        return tuple(stop - start for start, stop in self.box)

    @property
    def elements(self) -> int:
        """Number of elements of the slice."""
        return math.prod(self.slice_shape)

    @property
    def key(self) -> str:
        """Name of the piece inside its file."""
        axis = "all" if self.split_axis is None else f"{self.split_axis}[{self.split_start}:{self.split_stop}]"
        return f"{self.name}|{self.kind}|{axis}|{self.flat_start}:{self.flat_stop}"


def slice_box(shape: Sequence[int], axis: int | None, start: int, stop: int) -> tuple[tuple[int, int], ...]:
    """Start and stop for each axis of a slice; only ``axis`` is narrowed."""
    return tuple((start, stop) if index == axis else (0, size) for index, size in enumerate(shape))


@dataclass(frozen=True)
class FileRecord:
    """One file of a checkpoint.

    Attributes:
        name: File name inside the checkpoint's directory.
        bytes: Size of the file.
        sha256: Checksum of its contents, in hexadecimal.
        fragments: The tensor fragments it holds; empty for other files.
    """

    name: str
    bytes: int
    sha256: str
    fragments: tuple[Fragment, ...] = ()


def record_file(path: Path, fragments: Sequence[Fragment] = ()) -> FileRecord:
    """Force a finished file to the disk and record its size and checksum.

    Args:
        path: The file, directly inside the checkpoint's temporary directory.
        fragments: The tensor fragments it holds.
    """
    sync_file(path)
    return FileRecord(path.name, path.stat().st_size, sha256_of(path), tuple(fragments))


@dataclass(frozen=True)
class Manifest:
    """The complete list of a checkpoint's contents.

    Attributes:
        step: Optimizer step at which it was taken.
        files: Every file but the manifest itself.
        metadata: What the run wants back at resume; JSON values only.
    """

    step: int
    files: tuple[FileRecord, ...]
    metadata: dict[str, Any]

    def to_json(self) -> str:
        """Text of the manifest, with a checksum of itself.

        Raises:
            CheckpointError: The metadata holds something that is not JSON.
        """
        try:
            # Reading back first makes keys strings, so that both sides sort them alike.
            content = json.loads(json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}))
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"checkpoint metadata of step {self.step} is not JSON: {error}") from error
        return json.dumps({"sha256": _content_checksum(content), "content": content}, indent=1)


def read_manifest(directory: Path) -> Manifest:
    """Read the manifest of a published checkpoint.

    Raises:
        CheckpointError: It is missing, damaged, or of another format version.
    """
    path = directory / MANIFEST
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        content = document["content"]
        intact = document["sha256"] == _content_checksum(content)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the checkpoint was never completed or is being deleted") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is unreadable: {error}") from error
    if not intact:
        raise CheckpointError(f"{path} is damaged: its checksum does not match")
    if content["format_version"] != FORMAT_VERSION:
        version = content["format_version"]
        raise CheckpointError(f"{path} has format version {version}, this program reads {FORMAT_VERSION}")
    files = tuple(_file_record(entry) for entry in content["files"])
    return Manifest(content["step"], files, content["metadata"])


def _content_checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _file_record(entry: dict[str, Any]) -> FileRecord:
    fragments = (Fragment(**{**item, "global_shape": tuple(item["global_shape"])}) for item in entry["fragments"])
    return FileRecord(entry["name"], entry["bytes"], entry["sha256"], tuple(fragments))
