"""Plans as text: a table, one plan in detail, the YAML to paste, JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from parallel.planning.communication import Cluster
from parallel.planning.search import GIB, Plan, Search

HEADER = (
    "| TP | also split | PP | DP | ZeRO | micro-batch | checkpointing | GiB per process | s per step | tokens/s | MFU "
    "| hours | GPU-hours |"
)


def plan_table(plans: Sequence[Plan], tokens: float) -> list[str]:
    """A Markdown table; hours are those to so many tokens."""
    return [HEADER, "|" + "---|" * (HEADER.count("|") - 1), *(_row(plan, tokens) for plan in plans)]


def _row(plan: Plan, tokens: float) -> str:
    parallel, hours = plan.work.parallel, plan.hours(tokens)
    cells = (
        parallel.tensor,
        " and ".join(_split_rows(plan)) or "nothing",
        parallel.pipeline,
        parallel.data,
        parallel.zero_stage,
        plan.work.micro_batch_size,
        parallel.activation_checkpointing,
        f"{plan.memory.total / GIB:.1f}",
        f"{plan.time.total:.3g}",
        f"{plan.tokens_per_second:,.0f}",
        f"{plan.utilization:.1%}",
        f"{hours:,.1f}",
        f"{hours * parallel.world_size:,.0f}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def _split_rows(plan: Plan) -> list[str]:
    parallel = plan.work.parallel
    chosen = (("sequence", parallel.sequence_parallel), ("blocks", parallel.block_parallel))
    return [name for name, is_split in chosen if is_split]


def explanation(plan: Plan) -> list[str]:
    """Memory and time of a plan by component."""
    memory = [f"  {name:15} {size / GIB:8.2f} GiB" for name, size in asdict(plan.memory).items()]
    seconds = [f"  {name:15} {value:8.3f} s" for name, value in asdict(plan.time).items()]
    return [
        "memory of the process that needs most, at its peak:",
        *memory,
        f"  {'total':15} {plan.memory.total / GIB:8.2f} GiB",
        "time of a step, on the slowest process:",
        *seconds,
        f"  {'total':15} {plan.time.total:8.3f} s",
    ]


def yaml_snippet(plan: Plan) -> list[str]:
    """The sections of a run's configuration that say so."""
    parallel = plan.work.parallel
    return [
        "parallel:",
        f"  tensor: {parallel.tensor}",
        f"  pipeline: {parallel.pipeline}",
        f"  data: {parallel.data}",
        f"  sequence_parallel: {str(parallel.sequence_parallel).lower()}",
        f"  block_parallel: {str(parallel.block_parallel).lower()}",
        f"  zero_stage: {parallel.zero_stage}",
        f"  activation_checkpointing: {parallel.activation_checkpointing}",
        "train:",
        f"  micro_batch_size: {plan.work.micro_batch_size}",
    ]


def plan_values(plan: Plan, tokens: float) -> dict[str, Any]:
    """A plan for JSON."""
    parallel, hours = plan.work.parallel, plan.hours(tokens)
    return {
        "parallel": parallel.model_dump(mode="json"),
        "micro_batch_size": plan.work.micro_batch_size,
        "num_micro_batches": plan.work.num_micro_batches,
        "memory_bytes": {**asdict(plan.memory), "total": plan.memory.total},
        "step_seconds": {**asdict(plan.time), "total": plan.time.total},
        "tokens_per_second": plan.tokens_per_second,
        "model_flops_utilization": plan.utilization,
        "hours": hours,
        "gpu_hours": hours * parallel.world_size,
    }


def why_nothing_fits(found: Search, cluster: Cluster, processes: int) -> str:
    """One sentence: what the smallest layout lacks, or why no layout is allowed."""
    device = cluster.device
    if found.smallest is None:
        return f"no layout of {processes} processes is allowed: {'; '.join(found.refused)}"
    smallest, usable = found.smallest, device.memory_gib - device.reserved_gib
    parts = {name: size for name, size in asdict(smallest.memory).items() if size}
    largest = max(parts, key=lambda name: parts[name])
    return (
        f"no layout of {processes} x {device.name} fits: the smallest ({smallest.work.parallel}, micro-batch "
        f"{smallest.work.micro_batch_size}, checkpointing {smallest.work.parallel.activation_checkpointing}) needs "
        f"{smallest.memory.total / GIB:.1f} GiB per process, of which {largest} {parts[largest] / GIB:.1f}, and "
        f"{usable:.1f} of {device.memory_gib:.1f} GiB are usable; use more GPUs or larger ones"
    )
