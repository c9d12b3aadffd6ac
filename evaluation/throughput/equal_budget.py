"""Which model to train for a training budget and an inference budget (the question of the paper's section 3.6).

What training costs is FLOPs, or hours of GPUs under each model's best layout; what inference costs is FLOPs or the
least time per generated token. Losses are not predicted: they are given.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from evaluation.throughput.costs import Cost, Workload, decoding_costs, prompt_costs
from parallel.errors import ConfigurationError
from parallel.planning.hardware import Device
from parallel.planning.search import Plan, Training

UNITS: dict[str, tuple[str, float]] = {
    "FLOP": ("flops", 1.0),
    "h": ("hours", 1.0),
    "ms": ("seconds", 1e-3),
    "s": ("seconds", 1.0),
}


@dataclass(frozen=True)
class Budget:
    """A number of FLOPs, GPU-hours or seconds per token."""

    kind: Literal["flops", "hours", "seconds"]
    amount: float


@dataclass(frozen=True)
class Setting:
    """How the model is used: the paper's two settings are 2048/128 and 128/2048."""

    batch_size: int
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Choice:
    """One model against both budgets.

    Attributes:
        name: of the model.
        training_flops: of `tokens`.
        gpu_hours: of the same, under the best layout; None: none fits.
        affordable_tokens: that the training budget buys; None: no budget, or no layout fits.
        inference_flops: per generated token.
        inference_seconds: per generated token of one sequence, at least.
        loss: as given; None: unknown.
        fits_training: some layout trains it, within the training budget.
        fits_inference: within the inference budget.
    """

    name: str
    training_flops: float
    gpu_hours: float | None
    affordable_tokens: float | None
    inference_flops: float
    inference_seconds: float
    loss: float | None
    fits_training: bool
    fits_inference: bool


def parse_budget(option: str, text: str, units: tuple[str, ...]) -> Budget:
    """Reads a number with a unit, such as 3e20FLOP.

    Raises:
        ConfigurationError: it is none.
    """
    match = re.fullmatch(r"\s*((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([A-Za-z]+)\s*", text)
    if match is not None and match[2] in units:
        kind, factor = UNITS[match[2]]
        amount = float(match[1]) * factor
        if 0.0 < amount < math.inf:
            return Budget(kind, amount)  # type: ignore[arg-type]
    raise ConfigurationError(
        f"{option}={text} is not a positive finite number with one of the units {', '.join(units)}, such as 5{units[0]}"
    )


def generation_cost(training: Training, setting: Setting, device: Device) -> tuple[float, float]:
    """FLOPs and least seconds (the roofline) per generated token, the prompt included."""
    value_bytes = 2 if training.precision == "bf16" else 4
    work = Workload(training.model, setting.batch_size, setting.prompt_tokens, setting.new_tokens, value_bytes)
    parts: list[tuple[Cost, int]] = [(cost, 1) for cost in prompt_costs(work).values()]
    parts += [(cost, count) for _, cost, count in decoding_costs(work)]
    peak, rate = device.flops_per_second[training.precision], device.bytes_per_second
    tokens = setting.batch_size * setting.new_tokens
    flops = sum(cost.flops * count for cost, count in parts)
    seconds = sum(max(cost.flops / peak, cost.moved_bytes / rate) * count for cost, count in parts)
    return flops / tokens, seconds / tokens


def judge(
    name: str,
    training: Training,
    plan: Plan | None,
    tokens: float,
    setting: Setting,
    device: Device,
    budgets: tuple[Budget | None, Budget | None],
    losses: Mapping[str, float],
) -> Choice:
    """Holds a model against the budgets for training and for inference."""
    flops = training.flops_per_token * tokens
    hours = None if plan is None else plan.hours(tokens) * plan.work.parallel.world_size
    generation_flops, generation_seconds = generation_cost(training, setting, device)
    spent = {"flops": flops, "hours": hours}
    used = {"flops": generation_flops, "seconds": generation_seconds}
    for_training, for_inference = budgets
    cost = None if for_training is None or plan is None else spent[for_training.kind]
    affordable = None if for_training is None or cost is None else tokens * for_training.amount / cost
    return Choice(
        name=name,
        training_flops=flops,
        gpu_hours=hours,
        affordable_tokens=affordable,
        inference_flops=generation_flops,
        inference_seconds=generation_seconds,
        loss=losses.get(name),
        fits_training=plan is not None and (for_training is None or (affordable is not None and affordable >= tokens)),
        fits_inference=for_inference is None or used[for_inference.kind] <= for_inference.amount,
    )


def best_choice(choices: list[Choice]) -> Choice | None:
    """The one with the lowest known loss among those within both budgets."""
    within = [choice for choice in choices if choice.fits_training and choice.fits_inference]
    known = [choice for choice in within if choice.loss is not None]
    return min(known, key=lambda choice: choice.loss or 0.0, default=None)


def choice_table(choices: list[Choice], tokens: float) -> list[str]:
    """A Markdown table, best losses first."""
    header = (
        f"| model | loss | training FLOPs of {tokens:.3g} tokens | GPU-hours | tokens that the budget buys | "
        "inference FLOPs per token | least us per token | within budgets |"
    )
    rows = []
    for one in sorted(choices, key=lambda choice: (choice.loss is None, choice.loss or 0.0, choice.name)):
        missed = [
            name for name, fits in (("training", one.fits_training), ("inference", one.fits_inference)) if not fits
        ]
        cells = (
            one.name,
            "unknown" if one.loss is None else f"{one.loss:.3f}",
            f"{one.training_flops:.3g}",
            "no layout fits" if one.gpu_hours is None else f"{one.gpu_hours:,.0f}",
            "" if one.affordable_tokens is None else f"{one.affordable_tokens:.3g}",
            f"{one.inference_flops:.3g}",
            f"{one.inference_seconds * 1e6:.3g}",
            f"not {' and '.join(missed)}" if missed else "yes",
        )
        rows.append(f"| {' | '.join(cells)} |")
    return [header, "|" + "---|" * (header.count("|") - 1), *rows]
