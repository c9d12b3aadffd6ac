"""Runs tasks of lm-eval and keeps their results."""

import importlib.metadata
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from evaluation.harness.loading import LoadedTask, quiet
from evaluation.padding import Padding
from evaluation.result import EvaluationResult

if TYPE_CHECKING:
    from evaluation.harness.adapter import HarnessModel


@dataclass(frozen=True)
class HarnessResult(EvaluationResult):
    """What lm-eval says of one task, or of a group.

    Attributes:
        name: As the user gave it.
        metrics: By lm-eval's name, of a group after the task's name and a slash; a filter other than the default one
            follows after a comma.
        standard_errors: Of the metrics that are means.
        documents: How many there were, after the limit.
        versions: Of lm-eval and of each task.
        source: File of the documents; None if lm-eval fetched them.
        limit: Documents of each task, at most.
        padding: How texts lay in blocks; None for vanilla models.
        max_length: Tokens of the longest input.
        unscored_continuations: So many lay within the first block and counted as 0.
    """

    name: str
    metrics: dict[str, float]
    standard_errors: dict[str, float]
    documents: int
    versions: dict[str, str]
    source: str | None
    limit: int | None
    padding: Padding | None
    max_length: int
    unscored_continuations: int

    def lines(self) -> list[str]:
        """A line for each metric."""
        lines = [f"{self.name} ({self.documents:,} documents)"]
        for metric, value in self.metrics.items():
            error = self.standard_errors.get(metric)
            lines.append(f"  {metric:<24} {value:10.4f}" + ("" if error is None else f" +- {error:.4f}"))
        if self.unscored_continuations:
            lines.append(
                f"  {self.unscored_continuations:,} continuations lie within the first block and count as 0; "
                "score them with --padding left"
            )
        return lines

    def scalars(self) -> dict[str, float]:
        """The metrics."""
        return dict(self.metrics)

    def to_json(self) -> dict[str, object]:
        """The attributes by name."""
        return asdict(self)


def run_task(model: "HarnessModel", task: LoadedTask, limit: int | None, padding: Padding | None) -> HarnessResult:
    """Runs a task or a group, without examples in the prompt unless it brings its own.

    Args:
        model: The model.
        task: What to run.
        limit: Documents of each task, at most; None: all.
        padding: For the record: how texts lie in blocks.
    """
    import lm_eval

    before = model.unscored_continuations
    for one in task.tasks["tasks"].values():
        if one.get_config("num_fewshot") is None:
            one.set_config(key="num_fewshot", value=0)
    with quiet(bars=model.shows_progress):
        evaluated = lm_eval.evaluate(model, task.tasks, limit=limit, bootstrap_iters=0)
    metrics, errors = _metrics(task, evaluated)
    return HarnessResult(
        name=task.name,
        metrics=metrics,
        standard_errors=errors,
        documents=sum(count["effective"] for count in evaluated["n-samples"].values()),
        versions={"lm_eval": importlib.metadata.version("lm_eval")}
        | {name: str(version) for name, version in evaluated["versions"].items()},
        source=task.source,
        limit=limit,
        padding=padding,
        max_length=model.max_length,
        unscored_continuations=model.unscored_continuations - before,
    )


def _metrics(task: LoadedTask, evaluated: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics and standard errors under the names of HarnessResult."""
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    for name, values in (evaluated["results"] | evaluated.get("groups", {})).items():
        means = _standard_errors(task, name, evaluated)
        for key, value in values.items():
            metric, comma, name_of_filter = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            shown = metric if name_of_filter == "none" else key
            full_name = shown if name == task.name else f"{name}/{shown}"
            metrics[full_name] = float(value)
            if key in means:
                errors[full_name] = means[key]
    return metrics, errors


def _standard_errors(task: LoadedTask, name: str, evaluated: Mapping[str, Any]) -> dict[str, float]:
    """Standard errors of a task's means; lm-eval computes them only together with its slow bootstrap of others."""
    from lm_eval.api.metrics import mean, mean_stderr

    if name not in task.tasks["tasks"]:
        return {}
    aggregation = task.tasks["tasks"][name].aggregation()
    values: dict[str, list[float]] = {}
    for sample in evaluated["samples"][name]:
        for metric in sample["metrics"]:
            if aggregation.get(metric) is mean:
                values.setdefault(f"{metric},{sample['filter']}", []).append(sample[metric])
    return {key: float(mean_stderr(numbers)) for key, numbers in values.items() if len(numbers) > 1}
