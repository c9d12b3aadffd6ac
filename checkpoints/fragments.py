"""Layout-free tensors: written as flat pieces of slices, read back for any other split."""

import difflib
import math
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from checkpoints.checksummed_file import write_checksummed
from checkpoints.errors import CheckpointError
from checkpoints.files import storage_error
from checkpoints.records import FileRecord, Fragment, Manifest, read_manifest, slice_box

__all__ = ["FileRecord", "Fragment", "FragmentReader", "write_fragments"]

Box = tuple[tuple[int, int], ...]
BYTES_PER_ELEMENT = 4


def write_fragments(path: Path, fragments: Sequence[tuple[Fragment, torch.Tensor]]) -> FileRecord:
    """Write one safetensors file of fragments and force it to the disk.

    Args:
        path: The new file, inside the directory that ``CheckpointStore.begin`` gave.
        fragments: Each fragment with its values, fp32 of shape [flat_stop - flat_start]. Empty ones are left out.

    Returns:
        The record of the file for the manifest.

    Raises:
        CheckpointError: A tensor does not fit its fragment, or the disk refuses; a partial file is removed.
    """
    tensors: dict[str, torch.Tensor] = {}
    for fragment, tensor in fragments:
        _check_tensor(fragment, tensor)
        if fragment.key in tensors:
            raise CheckpointError(f"fragment {fragment.key} is given twice for {path}")
        if tensor.numel():
            tensors[fragment.key] = tensor.detach().cpu().contiguous()
    needed = BYTES_PER_ELEMENT * sum(tensor.numel() for tensor in tensors.values())
    try:
        checksum = write_checksummed(path, tensors)
        written = tuple(fragment for fragment, _ in fragments if fragment.key in tensors)
        return FileRecord(path.name, path.stat().st_size, checksum, written)
    except OSError as error:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        raise storage_error(path, error, needed) from error


def _check_tensor(fragment: Fragment, tensor: torch.Tensor) -> None:
    expected = (fragment.flat_stop - fragment.flat_start,)
    if tensor.dtype != torch.float32 or tuple(tensor.shape) != expected:
        given = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
        raise CheckpointError(f"fragment {fragment.key} needs torch.float32 of shape {expected}, not {given}")


class FragmentReader:
    """Reads parameters of a published checkpoint under any split.

    Args:
        directory: The step directory.

    Raises:
        CheckpointError: The manifest is unreadable, or two fragments disagree about a parameter's shape.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._pieces: dict[tuple[str, str], dict[Box, list[tuple[str, Fragment]]]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._open_files: dict[str, Any] = {}
        self._index(read_manifest(directory))

    def __enter__(self) -> Self:
        """Return the reader."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files."""
        self.close()

    def close(self) -> None:
        """Close all files; reading opens them again."""
        for file in self._open_files.values():
            file.__exit__(None, None, None)
        self._open_files.clear()

    def names(self, kind: str) -> list[str]:
        """Names of all parameters that have this kind of tensor, sorted."""
        return sorted(name for name, of_kind in self._pieces if of_kind == kind)

    def global_shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole parameter.

        Raises:
            CheckpointError: The checkpoint does not hold the parameter.
        """
        if name not in self._shapes:
            raise self._unknown(name, self._shapes)
        return self._shapes[name]

    def read_full(self, name: str, kind: str) -> torch.Tensor:
        """Read a whole tensor, fp32 in its global shape.

        Raises:
            CheckpointError: The tensor is not in the checkpoint, or a part of it is missing.
        """
        return self.read(name, kind).view(self.global_shape(name))

    def read(
        self,
        name: str,
        kind: str,
        *,
        split_axis: int | None = None,
        split_start: int = 0,
        split_stop: int | None = None,
        flat_start: int = 0,
        flat_stop: int | None = None,
    ) -> torch.Tensor:
        """Read a flat range of any slice of a tensor.

        Args:
            name: Global parameter name.
            kind: ``weight``, ``exp_avg`` or ``exp_avg_sq``.
            split_axis: Axis the slice narrows; None for the whole tensor, whatever the rows say.
            split_start: First row of the slice along ``split_axis``.
            split_stop: One past its last row; None for the end.
            flat_start: First element in the row-major flattened slice.
            flat_stop: One past the last element; None for the end.

        Returns:
            The values, fp32 of shape [flat_stop - flat_start].

        Raises:
            CheckpointError: The tensor is not in the checkpoint, the range lies outside it, or a part is missing.
        """
        shape = self.global_shape(name)
        stored = self._pieces.get((name, kind))
        if stored is None:
            raise self._unknown(f"{name} ({kind})", [f"{known} ({of_kind})" for known, of_kind in self._pieces])
        if split_stop is None:
            split_stop = 0 if split_axis is None else shape[split_axis]
        wanted = slice_box(shape, split_axis, split_start, split_stop)
        elements = math.prod(_box_shape(wanted))
        stop = elements if flat_stop is None else flat_stop
        _check_range(name, shape, wanted, (flat_start, stop), elements)
        if wanted in stored:
            values, covered = self._read_flat(stored[wanted], flat_start, stop)
        else:
            values, covered = self._assemble(stored, wanted, flat_start, stop)
        if not bool(covered.all()):
            raise self._gap(name, kind, wanted, covered, flat_start)
        return values

    def _index(self, manifest: Manifest) -> None:
        pieces: dict[tuple[str, str], dict[Box, list[tuple[str, Fragment]]]] = defaultdict(lambda: defaultdict(list))
        for record in manifest.files:
            for fragment in record.fragments:
                known = self._shapes.setdefault(fragment.name, fragment.global_shape)
                if known != fragment.global_shape:
                    shapes = f"{known} and {fragment.global_shape}"
                    raise CheckpointError(f"{self.directory}: fragments of {fragment.name} disagree: {shapes}")
                pieces[fragment.name, fragment.kind][fragment.box].append((record.name, fragment))
        self._pieces = {key: dict(boxes) for key, boxes in pieces.items()}

    def _read_flat(
        self, pieces: list[tuple[str, Fragment]], start: int, stop: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Values of a flat range of one stored slice, and which of them were found; both of shape [stop - start]."""
        values = torch.empty(stop - start)
        covered = torch.zeros(stop - start, dtype=torch.bool)
        for file_name, fragment in pieces:
            low, high = max(start, fragment.flat_start), min(stop, fragment.flat_stop)
            # Replicated parameters are stored more than once; one copy is enough.
            if low >= high or bool(covered[low - start : high - start].all()):
                continue
            offset = fragment.flat_start
            values[low - start : high - start] = self._load(file_name, fragment.key, low - offset, high - offset)
            covered[low - start : high - start] = True
        return values, covered

    def _assemble(
        self, stored: dict[Box, list[tuple[str, Fragment]]], wanted: Box, start: int, stop: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Like ``_read_flat``, for a slice that was not stored as such: put together from those it intersects."""
        row = math.prod(_box_shape(wanted)[1:])
        first, last = start // row, -(-stop // row)
        origin = wanted[0][0]
        target: Box = ((origin + first, origin + last), *wanted[1:])
        values = torch.empty(_box_shape(target))
        covered = torch.zeros(_box_shape(target), dtype=torch.bool)
        for box, pieces in stored.items():
            common = _intersect(box, target)
            if common is None:
                continue
            part, found = self._read_rows(pieces, box, common)
            place = _relative(common, target)
            values[place] = torch.where(found, part, values[place])
            covered[place] |= found
        window = slice(start - first * row, stop - first * row)
        return values.flatten()[window], covered.flatten()[window]

    def _read_rows(
        self, pieces: list[tuple[str, Fragment]], box: Box, common: Box
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The part ``common`` of a stored slice ``box``, reading only the rows of axis 0 that it touches."""
        rest = _box_shape(box)[1:]
        row = math.prod(rest)
        first, last = common[0][0] - box[0][0], common[0][1] - box[0][0]
        values, covered = self._read_flat(pieces, first * row, last * row)
        rows: Box = (common[0], *box[1:])
        inside = _relative(common, rows)
        return values.view(-1, *rest)[inside], covered.view(-1, *rest)[inside]

    def _load(self, file_name: str, key: str, start: int, stop: int) -> torch.Tensor:
        path = self.directory / file_name
        try:
            if file_name not in self._open_files:
                self._open_files[file_name] = safe_open(path, framework="pt").__enter__()
            return self._open_files[file_name].get_slice(key)[start:stop]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {key} from {path}: {error}") from error

    def _unknown(self, name: str, known: Sequence[str] | dict[str, Any]) -> CheckpointError:
        nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
        hint = f"; the nearest is {nearest[0]}" if nearest else ""
        return CheckpointError(f"{self.directory} holds no parameter {name}{hint}")

    def _gap(self, name: str, kind: str, wanted: Box, covered: torch.Tensor, start: int) -> CheckpointError:
        missing = (~covered).nonzero().flatten()
        first = int(missing[0])
        found_again = covered[first:].nonzero().flatten()
        end = first + int(found_again[0]) if found_again.numel() else covered.numel()
        flat = f"{start + first}:{start + end}"
        rows = ", ".join(f"{low}:{high}" for low, high in wanted)
        return CheckpointError(f"{self.directory}: {name} ({kind}), slice [{rows}], lacks the flat range {flat}")


def _check_range(name: str, shape: tuple[int, ...], wanted: Box, flat: tuple[int, int], elements: int) -> None:
    inside = all(0 <= start < stop <= size for (start, stop), size in zip(wanted, shape, strict=True))
    if not inside:
        rows = ", ".join(f"{start}:{stop}" for start, stop in wanted)
        raise CheckpointError(f"slice [{rows}] of {name} is not inside its shape {shape}")
    if not 0 <= flat[0] <= flat[1] <= elements:
        raise CheckpointError(f"range {flat[0]}:{flat[1]} of {name} is not inside a slice of {elements} elements")


def _box_shape(box: Box) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in box)


def _intersect(first: Box, second: Box) -> Box | None:
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(first, second, strict=True))
    return common if all(start < stop for start, stop in common) else None


def _relative(inner: Box, outer: Box) -> tuple[slice, ...]:
    """Indices of a box inside a tensor that holds another one."""
    pairs = zip(inner, outer, strict=True)
    return tuple(slice(start - origin, stop - origin) for (start, stop), (origin, _) in pairs)
