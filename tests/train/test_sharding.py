"""Sharding is real: what each rank holds equals the formula."""

import math
from typing import Any, Literal

import pytest
import torch

from checkpoints.engine_state import owned_parts
from parallel.config import ParallelConfig
from parallel.costs import pipeline_split
from parallel.stage import build_stage
from parallel.topology import initialize_topology
from tests.processes import run_processes
from train.batches import split_global_batch
from train.optimizer import parameter_groups
from train.selftest import OPTIMIZER, selftest_batch
from train.selftest_models import MODELS
from train.step import StepEngine

ALIGNMENT = 2  # DeepSpeed pads a flat partition to this many elements per data-parallel rank


def held(parallel: ParallelConfig) -> tuple[int, int, list[int], int]:
    """(pipeline rank, parameters in the stage, elements of each Adam partition, elements this rank owns)."""
    place = initialize_topology(parallel)
    config = MODELS["block"]
    stage = build_stage(config, parallel)
    parameters = sum(parameter.numel() for parameter in stage.parameters())
    engine = StepEngine(stage, parallel, OPTIMIZER, "fp32", 1)
    engine.accumulate(split_global_batch(selftest_batch(config, 0), parallel.data, place.data_rank, 1))
    engine.update(1e-3)
    moments = [state["exp_avg"].numel() for state in engine.engine.basic_optimizer.state.values()]
    owned = sum(part.stop - part.start for part in owned_parts(engine.engine))
    return place.pipeline_rank, parameters, moments, owned


def group_sizes(parallel: ParallelConfig) -> list[int]:
    """Elements of the decayed and of the exempt parameters of the unpipelined, unsplit selftest model."""
    initialize_topology(ParallelConfig(data=parallel.world_size))
    stage = build_stage(MODELS["block"], ParallelConfig(data=parallel.world_size))
    return [sum(p.numel() for p in group["params"]) for group in parameter_groups(stage, OPTIMIZER)]


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("pipeline", [1, 2])
def test_parameters_per_rank_under_tensor_and_pipeline(tensor: int, pipeline: int) -> None:
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline)
    stages = pipeline_split(MODELS["block"], pipeline)
    for rank, parameters, _, owned in run_processes(parallel.world_size, held, parallel):
        expected = sum(cost.parameters_per_rank(tensor) for cost in stages[rank])
        assert parameters == owned == expected


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_optimizer_elements_per_rank_under_zero(zero_stage: int) -> None:
    parallel = ParallelConfig(data=2, zero_stage=zero_stage)  # type: ignore[arg-type]
    sizes = run_processes(2, group_sizes, parallel)[0]
    ranks = run_processes(2, held, parallel)
    whole = sum(sizes)
    if zero_stage == 0:
        assert all(owned == sum(moments) == whole for _, _, moments, owned in ranks)
        return
    assert sum(owned for *_, owned in ranks) == whole, "each element has exactly one owner"
    for _, _, moments, _ in ranks:
        if zero_stage == 3:  # each parameter is padded on its own
            assert whole / 2 <= sum(moments) <= whole / 2 + 100
        else:
            unit = 2 * ALIGNMENT
            assert sorted(moments) == sorted(math.ceil(size / unit) * unit // 2 for size in sizes)


def whole_after_an_update(parallel: ParallelConfig) -> dict[str, bool]:
    """Whether this rank holds a parameter whole, by name."""
    place = initialize_topology(parallel)
    stage = build_stage(MODELS["block"], parallel)
    engine = StepEngine(stage, parallel, OPTIMIZER, "fp32", 1)
    engine.accumulate(split_global_batch(selftest_batch(MODELS["block"], 0), parallel.data, place.data_rank, 1))
    engine.update(1e-3)
    return {name: parameter.numel() > 0 for name, parameter in stage.named_parameters()}


def test_zero_3_shards_matrices_of_small_models_too() -> None:
    """Otherwise no test of ZeRO 3 would have a parameter gathered."""
    for is_whole in run_processes(2, whole_after_an_update, ParallelConfig(data=2, zero_stage=3)):
        matrices = {name for name in is_whole if name.endswith(".weight") and "norm." not in name}
        assert matrices
        assert not any(is_whole[name] for name in matrices)
        assert is_whole["block_decoder.output.norm.weight"]


def stage_in_use(parallel: ParallelConfig, precision: Literal["fp32", "bf16"]) -> int:
    """The ZeRO stage of the engine that trains."""
    initialize_topology(parallel)
    stage = build_stage(MODELS["block"], parallel, torch.bfloat16 if precision == "bf16" else torch.float32)
    return int(StepEngine(stage, parallel, OPTIMIZER, precision, 1).engine.zero_optimization_stage())


@pytest.mark.parametrize(
    ("layout", "precision", "in_use"),
    [
        ({"zero_stage": 1}, "fp32", 0),
        ({"zero_stage": 2, "overlap_gradient_reduction": True}, "fp32", 0),
        ({"zero_stage": 3}, "fp32", 3),
        ({"zero_stage": 1}, "bf16", 1),
        ({"zero_stage": 1, "data": 2}, "fp32", 1),
    ],
)
def test_zero_is_left_out_where_it_has_nothing_to_shard(
    layout: dict[str, Any], precision: Literal["fp32", "bf16"], in_use: int
) -> None:
    parallel = ParallelConfig(**layout)
    assert set(run_processes(parallel.world_size, stage_in_use, parallel, precision)) == {in_use}
