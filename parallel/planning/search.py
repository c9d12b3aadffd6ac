"""Every layout that a number of processes allows, with its memory and time, best first."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from pydantic import ValidationError

from parallel.checkpointing import POLICIES, Policy
from parallel.config import ModelConfig, ParallelConfig, check_layout, check_precision
from parallel.costs import forward_flops_per_token
from parallel.planning.communication import Cluster
from parallel.planning.memory import Memory, stage_memory
from parallel.planning.policies import stage_policies
from parallel.planning.step_time import StepTime, step_time
from parallel.planning.workload import Workload

GIB = 2**30
TRAINING_PER_FORWARD = 3.0


@dataclass(frozen=True)
class Training:
    """What is trained, whatever the layout.

    Attributes:
        model: the model.
        global_batch_size: sequences per optimizer step.
        precision: of weights and activations.
        decays_all: see Workload.
    """

    model: ModelConfig
    global_batch_size: int
    precision: Literal["fp32", "bf16"]
    decays_all: bool

    @property
    def flops_per_token(self) -> float:
        """Of forward and backward pass, nothing recomputed."""
        return TRAINING_PER_FORWARD * forward_flops_per_token(self.model)


@dataclass(frozen=True)
class Plan:
    """A layout with what it costs.

    Attributes:
        work: the layout and its micro-batches.
        memory: of the process that needs most.
        time: of a step.
        tokens_per_second: over all processes.
        utilization: model FLOPs over the peak of all devices (MFU).
    """

    work: Workload
    memory: Memory
    time: StepTime
    tokens_per_second: float
    utilization: float

    def hours(self, tokens: float) -> float:
        """Hours until so many tokens."""
        return tokens / self.tokens_per_second / 3600


@dataclass(frozen=True)
class Search:
    """What was found.

    Attributes:
        plans: layouts that fit, fastest first.
        smallest: the layout that needs least memory, whether it fits or not; None: no layout is allowed at all.
        refused: why layouts are not allowed.
    """

    plans: list[Plan]
    smallest: Plan | None
    refused: list[str]


def largest_memory(work: Workload) -> Memory:
    """Memory of the process that needs most."""
    stages = range(work.parallel.pipeline)
    return max(
        (stage_memory(work, stage, stage_policies(work, stage)) for stage in stages), key=lambda memory: memory.total
    )


def evaluate(work: Workload, cluster: Cluster) -> Plan:
    """Memory and time of one layout."""
    time = step_time(work, cluster, [stage_policies(work, stage) for stage in range(work.parallel.pipeline)])
    tokens = work.tokens * work.num_micro_batches * work.parallel.data
    rate = tokens / time.total
    peak = cluster.device.flops_per_second[work.precision] * work.parallel.world_size
    flops = TRAINING_PER_FORWARD * forward_flops_per_token(work.model)
    return Plan(work, largest_memory(work), time, rate, rate * flops / peak)


def search(training: Training, cluster: Cluster, processes: int) -> Search:
    """Evaluates every allowed layout.

    Args:
        training: what is trained.
        cluster: on what.
        processes: how many there are, all of which are used.
    """
    limit = (cluster.device.memory_gib - cluster.device.reserved_gib) * GIB
    fitting: list[Plan] = []
    smallest: Plan | None = None
    refused: dict[str, None] = {}
    for parallel in _layouts(training, processes, refused):
        for work in _workloads(training, parallel, cluster, refused):
            plan = evaluate(work, cluster)
            if smallest is None or plan.memory.total < smallest.memory.total:
                smallest = plan
            if plan.memory.total <= limit:
                fitting.append(plan)
    return Search(sorted(fitting, key=lambda plan: (plan.time.total, plan.memory.total)), smallest, list(refused))


def _layouts(training: Training, processes: int, refused: dict[str, None]) -> Iterator[ParallelConfig]:
    """Layouts that the model and the precision allow; why the others are not goes to `refused`."""
    for tensor in _divisors(processes):
        for pipeline in _divisors(processes // tensor):
            for zero_stage in (0, 1, 2, 3):
                values: dict[str, object] = {
                    "tensor": tensor,
                    "pipeline": pipeline,
                    "data": processes // tensor // pipeline,
                    "zero_stage": zero_stage,
                }
                for rows in _splits_of_rows(tensor):
                    parallel = _allowed(training, values | rows, refused)
                    if parallel is not None:
                        yield parallel


def _splits_of_rows(tensor: int) -> list[dict[str, bool]]:
    """What a tensor-parallel layout can spread besides matrices."""
    if tensor == 1:
        return [{}]
    choices = product((False, True), repeat=2)
    return [{"sequence_parallel": sequence, "block_parallel": blocks} for sequence, blocks in choices]


def _allowed(training: Training, values: dict[str, object], refused: dict[str, None]) -> ParallelConfig | None:
    try:
        parallel = ParallelConfig.model_validate(values)
        check_layout(training.model, parallel)
        check_precision(parallel, training.precision)
    except ValidationError as error:
        refused[error.errors()[0]["msg"].removeprefix("Value error, ")] = None
        return None
    except ValueError as error:
        refused[str(error)] = None
        return None
    # What would train like another layout is not listed beside it.
    return parallel if parallel == parallel.without_idle_sharding(training.precision) else None


def _workloads(
    training: Training, parallel: ParallelConfig, cluster: Cluster, refused: dict[str, None]
) -> Iterator[Workload]:
    batch, rest = divmod(training.global_batch_size, parallel.data)
    if rest:
        reason = (
            f"train.global_batch_size={training.global_batch_size} is not a multiple of parallel.data={parallel.data}"
        )
        refused[reason] = None
        return
    for micro_batch_size in _divisors(batch):
        work = Workload(
            model=training.model,
            parallel=parallel,
            micro_batch_size=micro_batch_size,
            num_micro_batches=batch // micro_batch_size,
            precision=training.precision,
            on_gpu=cluster.device.name != "cpu",
            decays_all=training.decays_all,
        )
        for policy in POLICIES:
            yield with_policy(work, policy)


def with_policy(work: Workload, policy: Policy) -> Workload:
    """The same with another activation checkpointing."""
    parallel = work.parallel.model_copy(update={"activation_checkpointing": policy})
    return replace(work, parallel=parallel)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
