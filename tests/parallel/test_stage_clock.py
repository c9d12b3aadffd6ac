"""The measured use of a pipeline: stages that take as long as they are told, run by the real schedule."""

import time

import pytest
import torch

from parallel.config import ParallelConfig
from parallel.stage import build_stage
from parallel.stage_clock import PipelineUse
from parallel.topology import initialize_topology
from tests.processes import run_processes
from train.batches import split_global_batch
from train.selftest import OPTIMIZER, selftest_batch
from train.selftest_models import MODELS
from train.step import StepEngine

SLEEP = 0.4  # seconds of a micro-batch, beside which what a small model computes does not count
MICRO_BATCHES = 4
STEPS = 3
WITHOUT_TARGETS = 3  # of the batch


def measured(parallel: ParallelConfig, sleeps: tuple[float, ...]) -> tuple[PipelineUse | None, PipelineUse | None]:
    """What is measured of a step whose stages take so long, and of one without any target."""
    place = initialize_topology(parallel)
    stage = build_stage(MODELS["block"], parallel)
    engine = StepEngine(stage, parallel, OPTIMIZER, "fp32", 1)
    batches = split_global_batch(selftest_batch(MODELS["block"], 0), 1, 0, 1)
    engine.accumulate(batches[:MICRO_BATCHES])  # loads what is loaded when needed
    engine.update(1e-3)
    stage.register_forward_hook(lambda *_: time.sleep(sleeps[place.pipeline_rank]))
    spans, uses = [], []
    for _ in range(STEPS):
        started = time.monotonic()
        engine.accumulate(batches[:MICRO_BATCHES])
        uses.append(engine.pipeline_use())
        spans.append(time.monotonic() - started)
        engine.update(1e-3)
    use = uses[quietest(spans)]
    engine.accumulate(batches[WITHOUT_TARGETS : WITHOUT_TARGETS + 1])
    return use, engine.pipeline_use()


def quietest(spans: list[float]) -> int:
    """The step in which the machine disturbed the sleeping ranks least; all ranks name the same."""
    longest = torch.tensor(spans)
    torch.distributed.all_reduce(longest, torch.distributed.ReduceOp.MAX)
    return int(longest.argmin())


@pytest.mark.parametrize(
    ("sleeps", "bubble", "balance"),
    [
        ((SLEEP, SLEEP), 1 / (MICRO_BATCHES + 1), 1.0),  # (P - 1) / (M + P - 1)
        ((0.0, SLEEP), 0.5, 0.5),  # one works, one waits
    ],
)
def test_waiting_and_balance(sleeps: tuple[float, ...], bubble: float, balance: float) -> None:
    found = run_processes(2, measured, ParallelConfig(pipeline=2, zero_stage=0), sleeps)
    assert found[0] == found[1]
    use, nothing = found[0]
    assert nothing is None
    assert use is not None
    assert use.bubble == pytest.approx(bubble, abs=0.1)
    assert use.stage_balance == pytest.approx(balance, abs=0.1)


def test_without_a_pipeline_there_is_nothing_to_measure() -> None:
    assert run_processes(1, measured, ParallelConfig(), (0.0,)) == [(None, None)]
