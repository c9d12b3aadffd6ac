"""Gradients that are partly on each tensor-parallel rank are summed; the parity matrix compares whole steps."""

from typing import Any

import pytest
import torch

from parallel import partial_gradients
from parallel.config import ParallelConfig
from parallel.partial_gradients import partial_parameters, sum_accumulated
from parallel.stage import build_stage
from parallel.topology import initialize_topology
from tests.parallel.collectives import Collectives
from tests.processes import run_processes
from train.config import OptimizerConfig
from train.selftest import selftest_batch
from train.selftest_models import MODELS
from train.step import StepEngine

SHAPES = [(3, 4), (5,), (40,), (2, 2, 2), (1,)]


def summed(rank_factor: float) -> tuple[list[Any], int]:
    """Gradients of either rank after they were summed in buckets of 16 values, and the number of collectives."""
    place = initialize_topology(ParallelConfig(tensor=2))
    partial_gradients.BUCKET_VALUES = 16
    gradients = [torch.full(shape, (index + 1) * rank_factor**place.tensor_rank) for index, shape in enumerate(SHAPES)]
    gradients[0] = gradients[0].t()  # need not be contiguous
    with Collectives() as sent:
        sum_accumulated(gradients)
    return [(list(one.shape), one.unique().tolist()) for one in gradients], sent.reductions + sent.others


def collectives(zero_stage: Any, precision: Any) -> tuple[int, int]:
    """How many more a block-parallel step takes for three micro-batches than for one, and its partial gradients."""
    parallel = ParallelConfig(tensor=2, block_parallel=True, zero_stage=zero_stage)
    initialize_topology(parallel)
    config = MODELS["block"]
    stage = build_stage(config, parallel, torch.bfloat16 if precision == "bf16" else torch.float32)
    engine = StepEngine(stage, parallel, OptimizerConfig(learning_rate=1e-3), precision, 4)
    counts = []
    for number in (1, 3):
        with Collectives() as sent:
            engine.accumulate([selftest_batch(config, 0)] * number)
        engine.discard()
        counts.append(sent.reductions + sent.others)
    return counts[1] - counts[0], len(partial_parameters(stage))


@pytest.mark.slow
def test_accumulated_gradients_are_summed_in_buckets() -> None:
    """Smallest first: 1 + 5 + 8 values, 12 alone because all would be 26, and 40, which exceed a bucket, alone."""
    expected = [([4, 3], [11.0]), ([5], [22.0]), ([40], [33.0]), ([2, 2, 2], [44.0]), ([1], [55.0])]
    assert run_processes(2, summed, 10.0) == [(expected, 3)] * 2


@pytest.mark.slow
def test_they_are_summed_once_in_a_step() -> None:
    """But by ZeRO 2, which reduces the gradients of each micro-batch away."""
    once, partial = run_processes(2, collectives, 0, "fp32")[0]
    often, same = run_processes(2, collectives, 2, "bf16")[0]
    assert partial == same > 20
    assert once < 2 * partial <= often - once
