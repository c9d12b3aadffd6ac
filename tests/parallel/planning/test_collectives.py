"""The planner counts as many collectives of a micro-batch as two real processes run."""

from typing import Any

import pytest

from parallel.config import ParallelConfig
from parallel.planning.communication import Cluster
from parallel.planning.hardware import DEVICES
from parallel.planning.policies import stage_policies
from parallel.planning.step_time import step_time
from parallel.planning.workload import Workload
from parallel.stage import build_stage
from parallel.topology import initialize_topology
from tests.parallel.collectives import Collectives
from tests.processes import run_processes
from train.config import OptimizerConfig
from train.selftest import selftest_batch
from train.selftest_models import MODELS
from train.step import StepEngine

SEQUENCE, BLOCKS, AGAIN = {"sequence_parallel": True}, {"block_parallel": True}, {"activation_checkpointing": "layer"}
LAYOUTS: list[dict[str, Any]] = [{}, AGAIN, SEQUENCE, SEQUENCE | AGAIN, BLOCKS, BLOCKS | SEQUENCE]
CASES = [
    *(("block", layout) for layout in LAYOUTS),
    *(("vanilla", layout) for layout in LAYOUTS[:4]),
    *(("cross-attention", layout) for layout in LAYOUTS),
    *(("RoBERTa", layout) for layout in LAYOUTS),
    *(("MEGABYTE", layout) for layout in LAYOUTS),
    *(("one token per block", layout) for layout in LAYOUTS[:4]),
]
# Only the number of collectives costs, and an all-reduce twice what a gather or scatter does.
COUNTING = Cluster(
    DEVICES["cpu"].model_copy(update={"link_latency": 0.5, "link_bytes_per_second": 1e30, "gather_cost": 0.5}), 8, None
)
OF_THE_LOSS = 0.5  # one gather of the parts of the softmax for each chunk of logits


def counted() -> list[float]:
    """All-reduces of a micro-batch of each case, of which a gather is half a one."""
    found = []
    for name, layout in CASES:
        parallel = ParallelConfig(tensor=2, zero_stage=0, **layout)
        initialize_topology(parallel)
        engine = StepEngine(
            build_stage(MODELS[name], parallel), parallel, OptimizerConfig(learning_rate=1e-3), "fp32", 4
        )
        steps = []
        for number in (1, 3):
            with Collectives() as sent:
                engine.accumulate([selftest_batch(MODELS[name], 0)] * number)
            engine.discard()
            steps.append(sent.reductions + 0.5 * sent.others)
        found.append((steps[1] - steps[0]) / 2)
    return found


def planned(name: str, layout: dict[str, Any]) -> float:
    """The same by the planner."""
    one, three = (
        Workload(MODELS[name], ParallelConfig(tensor=2, zero_stage=0, **layout), 4, count, "fp32", on_gpu=False)
        for count in (1, 3)
    )
    seconds = [step_time(work, COUNTING, [stage_policies(work, 0)]).tensor for work in (one, three)]
    return (seconds[1] - seconds[0]) / 2


@pytest.mark.slow
def test_as_many_as_there_are() -> None:
    for (name, layout), count in zip(CASES, run_processes(2, counted)[0], strict=True):
        assert planned(name, layout) == pytest.approx(count - OF_THE_LOSS, abs=0.01), (name, layout)
