"""The block-parallel token decoder sends nothing in its forward pass; the parity matrix compares what it computes."""

import pytest

from parallel.config import ParallelConfig
from parallel.inputs import prepare_inputs
from parallel.stage import build_stage
from parallel.topology import initialize_topology
from tests.parallel.collectives import Collectives
from tests.processes import run_processes
from train.selftest import selftest_batch
from train.selftest_models import MODELS


def collectives(block_parallel: bool) -> int:
    """How many the token decoder's layers take in forward."""
    parallel = ParallelConfig(tensor=2, block_parallel=block_parallel)
    initialize_topology(parallel)
    config = MODELS["block"]
    stage = build_stage(config, parallel)
    inputs = prepare_inputs(config, selftest_batch(config, 0))
    layers = [name for name in stage.names if name.startswith("token_decoder.layers")]
    hidden = stage.run(None, inputs, stage.names[: stage.names.index(layers[0])])
    with Collectives() as sent:
        stage.run(hidden, inputs, layers)
    return sent.reductions + sent.others


@pytest.mark.slow
def test_its_layers_send_nothing() -> None:
    two_for_each_layer = 2 * MODELS["block"].tokens.num_layers
    assert run_processes(2, collectives, False) == [two_for_each_layer] * 2
    assert run_processes(2, collectives, True) == [0, 0]
