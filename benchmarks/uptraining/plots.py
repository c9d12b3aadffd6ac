"""The two plots of the study; needs matplotlib (the `evaluation` extra)."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.uptraining.plan import SOURCE, Method
from benchmarks.uptraining.statistics import Results, Spread

DOTS_PER_INCH = 100


def plot_losses(results: Results, path: Path) -> None:
    """Validation loss by method with standard deviations over seeds, and each model as a dot."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    shown = list(results.values())[::-1]
    for row, result in enumerate(shown):
        color = "tab:blue" if result.method.uptraining else "tab:gray"
        axes.errorbar(
            result.spread.mean, row, xerr=result.spread.deviation or 0.0, fmt="s", color=color, capsize=4, markersize=5
        )
        singles = [loss for losses in result.single_losses for loss in losses]
        axes.plot(singles, [row] * len(singles), ".", color="black", alpha=0.5, markersize=5)
    axes.set_yticks(range(len(shown)), [result.method.label for result in shown])
    axes.set_xlabel("validation loss (nats per token)\nsquares: mean and standard deviation over seeds; dots: models")
    axes.grid(axis="x", alpha=0.3)
    _save(figure, path)


def plot_positions(results: Results, path: Path) -> None:
    """Loss by position in the block, of block models with all seeds; as it is, and against each model's own mean."""
    figure, (absolute, relative) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for result in results.values():
        if len(result.by_position[0]) > 1 and not result.method.is_extra:
            _draw_positions(absolute, result.position_spreads, result.method)
            _draw_positions(relative, result.relative_position_spreads, result.method)
    if SOURCE in results:
        loss = results[SOURCE].spread.mean
        absolute.axhline(loss, color="black", linewidth=1, label="vanilla source, all positions")
    absolute.set_ylabel("validation loss (nats per token)")
    relative.set_ylabel("difference to the model's mean")
    for axes in (absolute, relative):
        axes.margins(y=0.08)
        axes.set_xlabel("position in the block")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    figure.legend(*absolute.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3)
    _save(figure, path)


def _draw_positions(axes: Axes, spreads: Sequence[Spread], method: Method) -> None:
    axes.errorbar(
        range(1, len(spreads) + 1),
        [one.mean for one in spreads],
        yerr=[one.deviation or 0.0 for one in spreads],
        marker="o",
        markersize=4,
        capsize=3,
        linestyle="-" if method.uptraining else "--",
        label=method.label,
    )


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=DOTS_PER_INCH)
    plt.close(figure)
