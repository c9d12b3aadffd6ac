"""What `--dry-run` prints: the resolved configuration, the pipeline split and parameters; allocates nothing."""

from parallel.costs import PieceCost, pipeline_split, total_parameters
from train.config import RunConfig
from train.config_file import config_text


def dry_run_report(config: RunConfig) -> str:
    """Describes a run without starting it."""
    stages = pipeline_split(config.model, config.parallel.pipeline)
    slowest = max(_flops(stage) for stage in stages)
    lines = [config_text(config).rstrip(), "", "pipeline stages, cost in forward GFLOP per sequence:"]
    for index, stage in enumerate(stages):
        share = _flops(stage) / slowest
        span = stage[0].name if len(stage) == 1 else f"{stage[0].name} .. {stage[-1].name}"
        lines.append(f"  stage {index}: {_flops(stage) / 1e9:12.3f}  ({share:4.0%} of the slowest)  {span}")
    lines += ["", "parameters per module:"]
    lines += [f"  {name:<16}{count:>16,}" for name, count in _by_module(stages).items()]
    lines += ["", f"parameters per rank (tensor-parallel size {config.parallel.tensor}):"]
    for index, stage in enumerate(stages):
        count = sum(cost.parameters_held(config.parallel) for cost in stage)
        lines.append(f"  stage {index}: {count:,}")
    lines += [
        "",
        f"processes: {config.parallel.world_size}",
        f"micro-batches per step and rank: {config.num_micro_batches}",
        f"tokens per step: {config.tokens_per_step:,}; in all: {config.tokens_per_step * config.train.last_step:,}",
        f"parameters: {total_parameters(config.model)}",
    ]
    return "\n".join(lines)


def _flops(stage: list[PieceCost]) -> float:
    return sum(cost.forward_flops for cost in stage)


def _by_module(stages: list[list[PieceCost]]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for cost in (cost for stage in stages for cost in stage):
        module = cost.name.split(".")[0]
        totals[module] = totals.get(module, 0) + cost.parameters
    return totals
