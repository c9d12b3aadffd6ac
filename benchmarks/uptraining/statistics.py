"""Summaries over seeds, and the table of the study."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from benchmarks.uptraining.plan import METHODS, RANDOM, SHORT, Method, StudyRun


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (n - 1) over seeds; the deviation is None for one seed."""

    mean: float
    deviation: float | None

    def __str__(self) -> str:
        return f"{self.mean:.3f}" if self.deviation is None else f"{self.mean:.3f} ± {self.deviation:.3f}"


@dataclass(frozen=True)
class MethodResult:
    """Evaluations of one method.

    Attributes:
        method: which one.
        seeds: the seeds, ascending.
        losses: nats per token, one per seed: the mean of its draws.
        by_position: the same by position in the block, [seeds][L]; [seeds][1] for vanilla.
        single_losses: those of all draws, [seeds][draws].
        steps: optimizer steps of each model.
        targets: tokens that were predicted.
    """

    method: Method
    seeds: tuple[int, ...]
    losses: tuple[float, ...]
    by_position: tuple[tuple[float, ...], ...]
    single_losses: tuple[tuple[float, ...], ...]
    steps: int
    targets: int

    @property
    def spread(self) -> Spread:
        """Of the losses."""
        return spread(self.losses)

    @property
    def position_spreads(self) -> list[Spread]:
        """Of the losses at each position."""
        return [spread(values) for values in zip(*self.by_position, strict=True)]

    @property
    def relative_position_spreads(self) -> list[Spread]:
        """The same, of differences to each model's mean over positions."""
        rows = [[loss - mean(row) for loss in row] for row in self.by_position]
        return [spread(values) for values in zip(*rows, strict=True)]


Results = Mapping[str, MethodResult]


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation."""
    return Spread(mean(values), stdev(values) if len(values) > 1 else None)


def gain(better: MethodResult, worse: MethodResult) -> Spread:
    """How much lower the loss of `better` is, seed by seed, over the seeds that both have."""
    theirs = dict(zip(worse.seeds, worse.losses, strict=True))
    pairs = zip(better.seeds, better.losses, strict=True)
    return spread([theirs[seed] - loss for seed, loss in pairs if seed in theirs])


def in_deviations(difference: Spread) -> float | None:
    """A difference in its own standard deviations; None for one seed."""
    if difference.deviation is None:
        return None
    return math.inf if difference.deviation == 0 else difference.mean / difference.deviation


def read_results(runs: Sequence[StudyRun]) -> dict[str, MethodResult]:
    """Collects the evaluations of finished runs, in the order of METHODS."""
    finished = [run for run in runs if run.result.is_file()]
    results = {}
    for method in METHODS:
        mine = [run for run in finished if run.method == method]
        if mine:
            results[method.name] = _collect(method, mine)
    return results


def _collect(method: Method, runs: Sequence[StudyRun]) -> MethodResult:
    """Summarizes the finished runs of one method."""
    by_seed: dict[int, list[dict[str, Any]]] = {}
    for run in sorted(runs, key=lambda run: (run.seed, run.draw)):
        by_seed.setdefault(run.seed, []).append(json.loads(run.result.read_text(encoding="utf-8")))
    singles = tuple(tuple(value["loss"] for value in values) for values in by_seed.values())
    positions = [zip(*(value["loss_by_position"] for value in values), strict=True) for values in by_seed.values()]
    return MethodResult(
        method=method,
        seeds=tuple(by_seed),
        losses=tuple(mean(losses) for losses in singles),
        by_position=tuple(tuple(map(mean, columns)) for columns in positions),
        single_losses=singles,
        steps=runs[0].steps,
        targets=next(iter(by_seed.values()))[0]["targets"],
    )


def results_as_json(results: Results) -> str:
    """Everything that the table and the plots show."""
    values = {
        name: {
            "label": result.method.label,
            "steps": result.steps,
            "targets": result.targets,
            "loss_by_seed": dict(zip(map(str, result.seeds), result.losses, strict=True)),
            "losses_of_draws_by_seed": dict(zip(map(str, result.seeds), result.single_losses, strict=True)),
            "loss_by_position_by_seed": dict(zip(map(str, result.seeds), result.by_position, strict=True)),
            "mean_loss": result.spread.mean,
            "standard_deviation": result.spread.deviation,
        }
        for name, result in results.items()
    }
    return json.dumps(values, indent=1) + "\n"


def table(results: Results) -> str:
    """The Markdown table: losses, and gains over both controls with their standard deviations."""
    lines = [
        "| model | steps | seeds | validation loss | below scratch, 10 % | below random layers |",
        "|---|---|---|---|---|---|",
    ]
    for result in results.values():
        gains = [_gain_cell(result, results.get(control)) for control in (SHORT, RANDOM)]
        cells = [result.method.label, f"{result.steps:,}", str(len(result.seeds)), str(result.spread), *gains]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _gain_cell(result: MethodResult, control: MethodResult | None) -> str:
    if control is None or control is result or not set(control.seeds) & set(result.seeds):
        return ""
    difference = gain(result, control)
    deviations = in_deviations(difference)
    return str(difference) if deviations is None else f"{difference} ({deviations:.1f} sd)"


def position_table(results: Results) -> str:
    """The Markdown table of losses by position in the block; only block models."""
    block = [result for result in results.values() if len(result.by_position[0]) > 1]
    if not block:
        return ""
    positions = range(1, len(block[0].by_position[0]) + 1)
    lines = [f"| model | {' | '.join(f'token {i}' for i in positions)} |", "|---" * (len(positions) + 1) + "|"]
    lines += [f"| {one.method.label} | {' | '.join(map(str, one.position_spreads))} |" for one in block]
    return "\n".join(lines) + "\n"
