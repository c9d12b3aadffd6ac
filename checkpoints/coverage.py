"""Whether a set of fragments holds every element of every parameter it mentions."""

from collections import defaultdict
from collections.abc import Iterable

from checkpoints.errors import CheckpointError
from checkpoints.records import Fragment

Range = tuple[int, int]


def check_coverage(fragments: Iterable[Fragment]) -> None:
    """Make sure that the fragments together are complete.

    Raises:
        CheckpointError: A range is missing; the message names the first parameter and range.
    """
    slices: dict[tuple[str, str], dict[tuple[int | None, Range], list[Fragment]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for fragment in fragments:
        rows = (0, 0) if fragment.split_axis is None else (fragment.split_start, fragment.split_stop)
        slices[fragment.name, fragment.kind][fragment.split_axis, rows].append(fragment)
    for (name, kind), pieces in slices.items():
        for (axis, rows), parts in pieces.items():
            _check_slice(f"{name} ({kind})", axis, rows, parts)
        _check_axis(f"{name} ({kind})", pieces)


def _check_slice(label: str, axis: int | None, rows: Range, parts: list[Fragment]) -> None:
    elements = parts[0].elements
    gap = first_gap([(part.flat_start, part.flat_stop) for part in parts], elements)
    if gap is not None:
        where = "" if axis is None else f", rows {rows[0]}:{rows[1]} of axis {axis},"
        raise CheckpointError(
            f"no rank wrote the flat range {gap[0]}:{gap[1]} of {label}{where}; nothing was published"
        )


def _check_axis(label: str, pieces: dict[tuple[int | None, Range], list[Fragment]]) -> None:
    by_axis: dict[int, list[Range]] = defaultdict(list)
    for axis, rows in pieces:
        if axis is None:
            return
        by_axis[axis].append(rows)
    shape = next(iter(pieces.values()))[0].global_shape
    gaps = [(axis, first_gap(ranges, shape[axis])) for axis, ranges in by_axis.items()]
    if all(gap is not None for _, gap in gaps):
        axis, gap = gaps[0]
        raise CheckpointError(f"no rank wrote rows {gap} of axis {axis} of {label}; nothing was published")


def first_gap(ranges: Iterable[Range], size: int) -> Range | None:
    """The first part of 0..size that no range covers, or None."""
    reached = 0
    for start, stop in sorted(ranges):
        if start > reached:
            return reached, start
        reached = max(reached, stop)
    return None if reached >= size else (reached, size)
