"""Where the time of a step goes: each part of it is counted once, whatever is computed again."""

import time
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from benchmarks.step_components import timed_components
from parallel.checkpointing import POLICIES, Policy
from parallel.config import ParallelConfig
from parallel.decoder_layer import DecoderLayer
from parallel.stage import build_stage
from parallel.topology import initialize_topology
from tests.processes import run_processes
from train.batches import split_global_batch
from train.selftest import OPTIMIZER, selftest_batch
from train.selftest_models import MODELS
from train.step import StepEngine

MICRO_BATCHES = 2
SLEEP = 0.02  # seconds of a slow piece, beside which what a small model computes does not count


class SlowRecomputation:
    """Sleeps while layers are computed again: at the end of attention, and before feed-forward, which does not end."""

    def __init__(self, layers: list[DecoderLayer]) -> None:
        self.slept: list[float] = []
        self._handles = ExitStack()
        for layer in layers:
            self._handles.callback(layer.attention.register_forward_hook(self._sleep).remove)
            self._handles.callback(layer.feed_forward.register_forward_pre_hook(self._sleep).remove)

    def __enter__(self) -> "SlowRecomputation":
        return self

    def __exit__(self, *_: object) -> None:
        self._handles.close()

    def _sleep(self, *_: Any) -> None:
        if torch._C._current_graph_task_id() != -1:  # backward is running
            started = time.perf_counter()
            time.sleep(SLEEP)
            self.slept.append(time.perf_counter() - started)


def measured(name: str, policy: Policy) -> tuple[dict[str, float], list[float], float]:
    """Seconds of a step by component, of each sleep in its backward pass, and of all of it."""
    parallel = ParallelConfig(activation_checkpointing=policy)
    initialize_topology(parallel)
    stage = build_stage(MODELS[name], parallel)
    engine = StepEngine(stage, parallel, OPTIMIZER, "fp32", 1)
    batches = split_global_batch(selftest_batch(MODELS[name], 0), 1, 0, 1)[:MICRO_BATCHES]
    layers = [module for module in stage.modules() if isinstance(module, DecoderLayer)]
    timed_components(engine, batches)  # the first step loads what is loaded when needed
    with SlowRecomputation(layers) as slow:
        started = time.perf_counter()
        seconds = timed_components(engine, batches)
        whole = time.perf_counter() - started
    assert all("transform" not in vars(layer) for layer in layers)
    assert len(slow.slept) == (0 if policy == "none" else 2 * len(layers) * MICRO_BATCHES)
    return seconds, slow.slept, whole


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["block", "vanilla Llama"])
def test_what_is_computed_again_is_counted_once(name: str, policy: Policy) -> None:
    ((seconds, slept, whole),) = run_processes(1, measured, name, policy)
    step = seconds.pop("step")
    assert 0 < step <= whole
    assert sum(seconds.values()) == pytest.approx(step)
    assert min(seconds.values()) >= 0
    if policy == "none":
        assert "recomputation" not in seconds
    else:
        assert seconds["recomputation"] >= sum(slept) > 0
