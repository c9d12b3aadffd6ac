"""The two plots of the study; needs matplotlib (the `evaluation` extra)."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.uptraining.plan import SOURCE
from benchmarks.uptraining.statistics import Results

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
    axes.set_xlabel("validation loss (nats per token), mean and standard deviation over seeds; dots: models")
    axes.grid(axis="x", alpha=0.3)
    _save(figure, path)


def plot_positions(results: Results, path: Path) -> None:
    """Loss by position in the block, of block models with all seeds."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for result in results.values():
        if len(result.by_position[0]) == 1 or result.method.is_extra:
            continue
        spreads = result.position_spreads
        axes.errorbar(
            range(1, len(spreads) + 1),
            [one.mean for one in spreads],
            yerr=[one.deviation or 0.0 for one in spreads],
            marker="o",
            markersize=4,
            capsize=3,
            linestyle="-" if result.method.uptraining else "--",
            label=result.method.label,
        )
    if SOURCE in results:
        mean_loss = results[SOURCE].spread.mean
        axes.axhline(mean_loss, color="black", linewidth=1, label="vanilla source, all positions")
    axes.set_xlabel("position in the block")
    axes.set_ylabel("validation loss (nats per token)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(figure, path)


def _save(figure: "plt.Figure", path: Path) -> None:
    figure.savefig(path, dpi=DOTS_PER_INCH)
    plt.close(figure)
