"""Plots as PNG files; without matplotlib there are none, and the numbers are still written."""

import contextlib
import functools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

RESOLUTION = 150  # dots per inch


@functools.cache
def can_plot() -> bool:
    """Whether matplotlib is installed; says once how to get it if not."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        print('no plots: matplotlib is not installed; pip install -e ".[evaluation]"', file=sys.stderr)
        return False
    return True


@contextlib.contextmanager
def figure(path: Path, panels: int = 1, width: float = 6.4, height: float = 4.2) -> Iterator[tuple[Any, list[Any]]]:
    """A figure with panels side by side, saved at the end.

    Args:
        path: The PNG file.
        panels: Number of axes.
        width: Of one panel, in inches.
        height: Of the figure, in inches.

    Yields:
        matplotlib's figure and axes.
    """
    # Drawn without pyplot: no display and no state that outlives the figure.
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(width * panels, height), layout="constrained")
    yield drawn, list(drawn.subplots(1, panels, squeeze=False)[0])
    drawn.savefig(path, dpi=RESOLUTION, format="png")


class HeatMap(NamedTuple):
    """One panel of values with a name for each row and column.

    Attributes:
        title: What the panel shows.
        values: [rows, columns]; NaN stays white.
        rows: Names of the rows, from the top.
        columns: Names of the columns.
    """

    title: str
    values: np.ndarray
    rows: Sequence[str]
    columns: Sequence[str]


def draw_heat_maps(
    path: Path,
    maps: Sequence[HeatMap],
    row_label: str,
    column_label: str,
    limits: tuple[float, float] | None = None,
    logarithmic: bool = False,
) -> Path:
    """Draws heat maps side by side on one colour scale.

    Args:
        path: The PNG file.
        maps: The panels.
        row_label: What rows are.
        column_label: What columns are.
        limits: Ends of the colour scale; by default those of the values.
        logarithmic: Colours by the logarithm of the values; there must be one above 0.

    Returns:
        The file.
    """
    from matplotlib.colors import LogNorm, Normalize

    shown = [np.asarray(one.values, dtype=float) for one in maps]
    every = np.concatenate([values[np.isfinite(values)] for values in shown])
    low, high = limits or (float((every[every > 0] if logarithmic else every).min()), float(every.max()))
    norm = (LogNorm if logarithmic else Normalize)(low, high)
    # Wide enough for a title, and not wider than a page.
    least, most = (4.8, 8.0) if len(maps) == 1 else (2.4, 4.0)
    width = min(max(least, 1.2 + 0.4 * len(maps[0].columns)), most)
    height = min(max(2.6, 1.6 + 0.3 * len(maps[0].rows)), 5.0)
    with figure(path, len(maps), width, height) as (drawn, axes):
        for axis, one, values in zip(axes, maps, shown, strict=True):
            image = axis.imshow(values, norm=norm, aspect="auto", cmap="viridis", interpolation="nearest")
            axis.set(xlabel=column_label, ylabel=row_label)
            axis.set_title(one.title, fontsize="medium")
            _name_ticks(axis.xaxis, one.columns)
            _name_ticks(axis.yaxis, one.rows)
            axis.tick_params(axis="x", rotation=45)
        drawn.colorbar(image, ax=axes)
    return path


def _name_ticks(axis: Any, names: Sequence[str]) -> None:
    """At most 16 names on an axis."""
    places = range(0, len(names), -(-len(names) // 16))
    axis.set_ticks(list(places), labels=[names[place] for place in places])
