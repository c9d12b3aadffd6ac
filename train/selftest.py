"""The parallel parity matrix: every layout against an unsharded model trained with plain PyTorch.

Losses, clipped gradient norms, gradients and updated weights over a few optimizer steps, with gradient accumulation,
micro-batches of one sequence, an odd number of target blocks, ragged padding, a micro-batch and a whole data-parallel
rank without a single valid target; in every other step documents are kept apart.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed
from torch import Tensor

from checkpoints.engine_state import engine_fragments
from checkpoints.records import Fragment
from parallel.compilation import compile_layers
from parallel.config import ModelConfig, ParallelConfig
from parallel.cpu_adaptation import compute_device
from parallel.inputs import MicroBatch, count_targets, target_mask
from parallel.planning.policies import stage_policies
from parallel.planning.workload import Workload
from parallel.schedule import masked_loss
from parallel.stage import build_stage
from parallel.topology import initialize_topology
from train.batches import split_global_batch
from train.config import OptimizerConfig
from train.metrics import global_loss_sums
from train.optimizer import adamw
from train.selftest_models import MODELS, SEQUENCE_PARALLEL, UNPIPELINED, VARIANTS
from train.step import StepEngine

WORLD_SIZES = (1, 2, 4, 8)
NUM_STEPS = 5
GLOBAL_BATCH = 8
FP32_TOLERANCE = 1e-5
# bf16 against the fp32 model: losses and norms, and single elements of tensors (8 bits of mantissa).
BF16_TOLERANCE = 5e-3
BF16_TENSOR_TOLERANCE = 5e-2
# A large epsilon keeps Adam smooth where a gradient is zero up to rounding (key biases outside the rotary dimensions):
# with the usual one, rounding noise would become a full-size update there.
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, epsilon=1e-2, weight_decay=0.1, clip_gradient_norm=0.5)


@dataclass(frozen=True)
class Case:
    """One layout to compare with the unsharded model."""

    name: str
    parallel: ParallelConfig
    micro_batch_size: int = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    model: str = "block"  # one of selftest_models.MODELS
    compiled: bool = False

    @property
    def tolerance(self) -> float:
        """Largest accepted relative difference of losses and gradient norms."""
        return FP32_TOLERANCE if self.precision == "fp32" else BF16_TOLERANCE

    @property
    def tensor_tolerance(self) -> float:
        """Largest accepted difference of gradients and weights, relative to the tensor's largest value."""
        return FP32_TOLERANCE if self.precision == "fp32" else BF16_TENSOR_TOLERANCE


@dataclass
class Trajectory:
    """What a few optimizer steps did; tensors are whole (unsharded), fp32 on CPU."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Largest relative differences of one case."""

    case: Case
    loss: float
    norm: float
    gradient: float
    weight: float
    worst: str

    @property
    def passed(self) -> bool:
        """Whether everything is within the case's tolerance."""
        scalars = max(self.loss, self.norm) <= self.case.tolerance
        return scalars and max(self.gradient, self.weight) <= self.case.tensor_tolerance


def selftest_batch(config: ModelConfig, step: int) -> MicroBatch:
    """Global batch of one step: ragged padding; sequence 3 never has a target, and in step 1 no odd sequence has.

    In even steps each sequence holds three documents, kept apart.
    """
    generator = torch.Generator().manual_seed(1234 + step)
    ids = torch.randint(1, config.vocab_size, (GLOBAL_BATCH, config.sequence_length), generator=generator)
    mask = torch.ones_like(ids, dtype=torch.bool)
    for row in range(GLOBAL_BATCH):
        mask[row, : row % 4] = False
        mask[row, config.sequence_length - 5 * (row % 3) :] = False
        mask[row, 13 : 13 + row % 4] = False
    empty = [3, *(range(1, GLOBAL_BATCH, 2) if step == 1 else [])]
    mask[empty, config.unit_length :] = False
    documents = _three_documents(config).to(compute_device()) if step % 2 == 0 else None
    return MicroBatch(ids.to(compute_device()), mask.to(compute_device()), documents)


def _three_documents(config: ModelConfig) -> Tensor:
    """Documents [B, S] that begin at other blocks in each sequence."""
    units = torch.arange(config.sequence_length) // config.unit_length
    first = 2 + torch.arange(GLOBAL_BATCH) % 3
    return sum((units >= begin[:, None]).long() for begin in (first, first + 2))  # type: ignore[return-value]


def baseline(config: ModelConfig) -> Trajectory:
    """Trains the unsharded model on every rank alike, with torch.optim and torch.nn.utils only."""
    parallel = ParallelConfig(data=torch.distributed.get_world_size())
    initialize_topology(parallel)
    stage = build_stage(config, parallel)
    optimizer = adamw(stage, OPTIMIZER)
    result = Trajectory()
    for step in range(NUM_STEPS):
        batch = selftest_batch(config, step)
        count = count_targets(config, batch)
        loss = masked_loss(stage(batch), target_mask(config, batch)) / count
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(stage.parameters(), OPTIMIZER.clip_gradient_norm)
        result.losses.append(float(loss.detach()))
        result.norms.append(float(norm))
        if step == 0:
            result.gradients = {n: p.grad.cpu().clone() for n, p in stage.named_parameters() if p.grad is not None}
        optimizer.step()
    result.weights = {name: parameter.detach().cpu() for name, parameter in stage.named_parameters()}
    return result


def train_case(config: ModelConfig, case: Case) -> Trajectory:
    """Trains under the case's layout with the real engine; whole tensors arrive on rank 0 only."""
    place = initialize_topology(case.parallel)
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    num_micro_batches = GLOBAL_BATCH // (case.parallel.data * case.micro_batch_size)
    work = Workload(config, case.parallel, case.micro_batch_size, num_micro_batches, case.precision, on_gpu=False)
    stage = build_stage(config, case.parallel, dtype, policies=stage_policies(work, place.pipeline_rank))
    if case.compiled:
        compile_layers(stage)
    engine = StepEngine(stage, case.parallel, OPTIMIZER, case.precision, case.micro_batch_size)
    result = Trajectory()
    for step in range(NUM_STEPS):
        batches = split_global_batch(
            selftest_batch(config, step), case.parallel.data, place.data_rank, case.micro_batch_size
        )
        sums = global_loss_sums(engine.accumulate(batches))
        update = engine.update(OPTIMIZER.learning_rate)
        result.losses.append(float(sums.loss.sum() / sums.count.sum()))
        result.norms.append(update.gradient_norm)
        if step == 0:
            # After one step from zero, the first moment is (1 - beta1) times the clipped gradient, in fp32.
            moments = _gather_whole(engine, "exp_avg")
            result.gradients = {name: moment / (1 - OPTIMIZER.beta1) for name, moment in moments.items()}
    result.weights = _gather_whole(engine, "weight")
    engine.engine.destroy()
    return result


def _gather_whole(engine: StepEngine, kind: str) -> dict[str, Tensor]:
    """Puts the ranks' fragments together into whole tensors on rank 0; fails on gaps and overlaps."""
    mine = [(fragment, values.cpu()) for fragment, values in engine_fragments(engine.engine) if fragment.kind == kind]
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    gathered: list[list[tuple[Fragment, Tensor]]] | None = [[] for _ in range(world_size)] if rank == 0 else None
    torch.distributed.gather_object(mine, gathered)
    whole: dict[str, Tensor] = {}
    for fragment, values in (item for part in gathered or [] for item in part):
        tensor = whole.setdefault(fragment.name, torch.full(fragment.global_shape, torch.nan))
        places = torch.arange(tensor.numel()).view(tensor.shape)
        if fragment.split_axis is not None:
            rows = fragment.split_stop - fragment.split_start
            places = places.narrow(fragment.split_axis, fragment.split_start, rows)
        places = places.reshape(-1)[fragment.flat_start : fragment.flat_stop]
        assert bool(tensor.view(-1)[places].isnan().all()), f"{fragment} is stored twice"
        tensor.view(-1)[places] = values
    return whole


def compare(case: Case, expected: Trajectory, actual: Trajectory) -> Comparison:
    """Largest relative differences: losses and norms per step, tensors by their largest value."""

    def worst_tensor(wanted: dict[str, Tensor], got: dict[str, Tensor]) -> tuple[float, str]:
        assert wanted.keys() == got.keys(), f"parameters differ: {wanted.keys() ^ got.keys()}"
        scale = max(float(value.abs().max()) for value in wanted.values())
        differences = {
            name: float((got[name] - value).abs().max() / max(float(value.abs().max()), 1e-6 * scale))
            for name, value in wanted.items()
        }
        return max((value if math.isfinite(value) else math.inf, name) for name, value in differences.items())

    gradient, gradient_name = worst_tensor(expected.gradients, actual.gradients)
    weight, weight_name = worst_tensor(expected.weights, actual.weights)
    return Comparison(
        case=case,
        loss=_largest(expected.losses, actual.losses),
        norm=_largest(expected.norms, actual.norms),
        gradient=gradient,
        weight=weight,
        worst=gradient_name if gradient > weight else weight_name,
    )


def _largest(expected: list[float], actual: list[float]) -> float:
    """Largest relative difference; infinite if any value is not finite."""
    differences = [abs(a - e) / abs(e) for e, a in zip(expected, actual, strict=True)]
    return max(value if math.isfinite(value) else math.inf for value in differences)


def parity_matrix(world_size: int) -> list[Case]:
    """All cases whose layout has exactly this many processes."""
    return [case for case in _all_cases() if case.parallel.world_size == world_size]


def _all_cases() -> list[Case]:
    return [*_paper_cases(), *_variant_cases()]


def _paper_cases() -> list[Case]:
    """Every layout, of the paper's two architectures."""
    return [
        *(_case(f"one process, ZeRO {zero}", zero=zero) for zero in (0, 1, 3)),
        _case("one process, micro-batch 2, selective", micro_batch_size=2, checkpointing="selective"),
        *(_case(f"one process, ZeRO {zero}, bf16", zero=zero, precision="bf16") for zero in (1, 2, 3)),
        _case("TP2", tensor=2),
        _case("TP2, selective", tensor=2, checkpointing="selective"),
        _case("TP2 + sequence parallel", tensor=2, sequence=True),
        _case("TP2 + sequence parallel, recompute", tensor=2, sequence=True, checkpointing="layer"),
        _case(
            "TP2 + sequence parallel, ZeRO 3, selective",
            tensor=2,
            sequence=True,
            zero=3,
            checkpointing="selective",
            micro_batch_size=2,
        ),
        _case("TP2 + sequence parallel, vanilla", tensor=2, sequence=True, model="vanilla"),
        _case("TP2 + sequence parallel, bf16", tensor=2, sequence=True, precision="bf16"),
        _case("PP2", pipeline=2),
        _case("PP2, vanilla, recompute", pipeline=2, model="vanilla", checkpointing="layer"),
        _case("PP2, selective", pipeline=2, checkpointing="selective"),
        _case("PP2, budget", pipeline=2, checkpointing="budget", memory_gib=2.1e-4),
        _case("PP2, bf16", pipeline=2, precision="bf16"),
        *(_case(f"DP2, ZeRO {zero}", data=2, zero=zero) for zero in (0, 1, 2, 3)),
        _case("DP2, ZeRO 1, vanilla, micro-batch 2", data=2, model="vanilla", micro_batch_size=2),
        _case("DP2, ZeRO 3, micro-batch 2, recompute", data=2, zero=3, micro_batch_size=2, checkpointing="layer"),
        _case("DP2, ZeRO 3, selective", data=2, zero=3, checkpointing="selective"),
        *(_case(f"DP2, ZeRO {zero}, bf16", data=2, zero=zero, precision="bf16") for zero in (1, 2, 3)),
        *(_case(f"DP2, ZeRO {zero}, overlap", data=2, zero=zero, overlap=True) for zero in (1, 2, 3)),
        *(
            _case(f"DP2, ZeRO {zero}, bf16, overlap", data=2, zero=zero, precision="bf16", overlap=True)
            for zero in (2, 3)
        ),
        _case("TP2 + sequence parallel, bf16, compiled", tensor=2, sequence=True, precision="bf16", compiled=True),
        _case("TP2 x DP2 + sequence parallel, overlap", tensor=2, data=2, sequence=True, overlap=True),
        _case("TP2 x PP2", tensor=2, pipeline=2),
        _case("TP2 x PP2 + sequence parallel", tensor=2, pipeline=2, sequence=True),
        _case("TP2 x DP2, ZeRO 1", tensor=2, data=2),
        _case("TP2 x DP2 + sequence parallel, ZeRO 2", tensor=2, data=2, zero=2, sequence=True),
        _case("TP2 x DP2, ZeRO 3", tensor=2, data=2, zero=3),
        *(_case(f"PP2 x DP2, ZeRO {zero}", pipeline=2, data=2, zero=zero) for zero in (0, 1, 2)),
        _case("PP4", pipeline=4),
        _case("TP2 x PP2 x DP2 + sequence parallel", tensor=2, pipeline=2, data=2, sequence=True),
        _case("TP2 x PP2 x DP2, bf16", tensor=2, pipeline=2, data=2, precision="bf16"),
    ]


def _variant_cases() -> list[Case]:
    """Every variant of the model, under tensor and pipeline parallelism."""
    return [
        *(
            _case(f"TP2, selective, {name}", tensor=2, model=name, checkpointing="selective", micro_batch_size=2)
            for name in VARIANTS
            if name not in SEQUENCE_PARALLEL
        ),
        *(
            _case(f"TP2 + sequence parallel, {name}", tensor=2, sequence=True, model=name, micro_batch_size=2)
            for name in SEQUENCE_PARALLEL
        ),
        _case("TP2, Qwen3", tensor=2, model="Qwen3"),
        _case("TP2 + block parallel", tensor=2, blocks=True),
        _case("TP2 + block parallel, ZeRO 3", tensor=2, zero=3, blocks=True, micro_batch_size=2),
        _case("TP2 + sequence and block parallel", tensor=2, sequence=True, blocks=True, micro_batch_size=2),
        _case("TP2 + block parallel, cross-attention", tensor=2, blocks=True, model="cross-attention"),
        _case("one process, cross-attention, compiled", model="cross-attention", compiled=True),
        _case("TP2 x PP2 + block parallel", tensor=2, pipeline=2, blocks=True),
        _case("TP2 x DP2 + block parallel, ZeRO 3", tensor=2, data=2, zero=3, blocks=True),
        _case("TP2 x DP2 + sequence and block parallel, ZeRO 1", tensor=2, data=2, sequence=True, blocks=True),
        _case("DP2, ZeRO 1, Qwen2, tied", data=2, model="Qwen2, tied"),
        _case("TP2, ZeRO 3, Qwen2, tied", tensor=2, zero=3, model="Qwen2, tied"),
        _case(
            "TP2, ZeRO 3, selective, multi-query",
            tensor=2,
            zero=3,
            model="vanilla, multi-query",
            checkpointing="selective",
        ),
        *(_case(f"PP2, {name}", pipeline=2, model=name) for name in VARIANTS if name not in UNPIPELINED),
        _case("TP2 x PP2, cross-attention", tensor=2, pipeline=2, model="cross-attention"),
        _case("TP4, Llama", tensor=4, model="Llama"),  # two ranks share each key and value head
    ]


def _case(
    name: str,
    tensor: int = 1,
    pipeline: int = 1,
    data: int = 1,
    zero: Literal[0, 1, 2, 3] = 1,
    sequence: bool = False,
    checkpointing: Literal["none", "selective", "layer", "budget"] = "none",
    memory_gib: float | None = None,
    blocks: bool = False,
    overlap: bool = False,
    **options: Any,
) -> Case:
    parallel = ParallelConfig(
        tensor=tensor,
        pipeline=pipeline,
        data=data,
        zero_stage=zero,
        sequence_parallel=sequence,
        activation_checkpointing=checkpointing,
        activation_memory_gib=memory_gib,
        block_parallel=blocks,
        overlap_gradient_reduction=overlap,
    )
    return Case(name, parallel, **options)


def run_matrix(cases: list[Case], report: Callable[[Comparison], None]) -> list[Comparison]:
    """Runs cases in the running process group; comparisons exist on rank 0 only.

    Args:
        cases: layouts for exactly this group's world size.
        report: called on rank 0 after each case.
    """
    baselines: dict[str, Trajectory] = {}
    comparisons = []
    for case in cases:
        config = MODELS[case.model]
        if case.model not in baselines:
            baselines[case.model] = baseline(config)
        actual = train_case(config, case)
        if torch.distributed.get_rank() == 0:
            comparisons.append(compare(case, baselines[case.model], actual))
            report(comparisons[-1])
    return comparisons
