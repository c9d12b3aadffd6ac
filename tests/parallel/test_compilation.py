"""Compiled layers: that they are, and only in training. The parity matrix compares what they compute."""

import pytest
import torch

from benchmarks.step_components import HEAD, components
from parallel.compilation import compile_layers, compile_seconds
from parallel.config import ParallelConfig
from parallel.stage import build_stage
from parallel.topology import initialize_topology
from train.selftest import MODELS, selftest_batch
from train.startup import StartupClock


@pytest.fixture(scope="module", autouse=True)
def compiler() -> None:
    torch.compiler.reset()


@pytest.mark.slow
def test_layers_are_compiled_when_training_calls_them() -> None:
    parallel = ParallelConfig()
    initialize_topology(parallel)
    stage = build_stage(MODELS["vanilla"], parallel)
    batch = selftest_batch(MODELS["vanilla"], 1)
    expected = stage(batch)
    compile_layers(stage)
    before = compile_seconds()
    with torch.no_grad():
        torch.testing.assert_close(stage(batch), expected)
    assert compile_seconds() == before
    torch.testing.assert_close(stage(batch), expected)
    first = compile_seconds() - before
    assert first > 0
    stage(batch)
    assert compile_seconds() - before == first


@pytest.mark.slow
def test_layers_that_are_computed_again_are_not() -> None:
    parallel = ParallelConfig(activation_checkpointing="layer")
    initialize_topology(parallel)
    stage = build_stage(MODELS["vanilla"], parallel)
    compile_layers(stage)
    before = compile_seconds()
    stage(selftest_batch(MODELS["vanilla"], 1)).sum().backward()
    assert compile_seconds() == before


def test_benchmarks_time_compiled_layers_whole() -> None:
    parallel = ParallelConfig()
    initialize_topology(parallel)
    stage = build_stage(MODELS["vanilla"], parallel)
    assert {"vanilla, attention", "vanilla, feed-forward"} <= {name for name, _ in components(stage)}
    compile_layers(stage)
    assert {name for name, _ in components(stage)} == {"vanilla.input", "vanilla, layers", HEAD}


def test_compilation_is_a_part_of_the_first_step() -> None:
    clock = StartupClock()
    clock.reached("first_step")
    clock.seconds["first_step"] = 10.0
    clock.split("first_step", "compilation", 7.0)
    assert clock.seconds == {"compilation": 7.0, "first_step": 3.0}
    assert "(compilation 7.0, first step 3.0)" in clock.describe()
