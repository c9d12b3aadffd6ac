"""The memory model against torch's allocator in real processes: states, buffers, activations, pipelines."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.plan_against_measurement import (
    Observation,
    allocated_bytes,
    describe,
    fastest,
    memory_table,
    observe,
    predicted_bytes,
    time_tables,
)
from parallel.config import ModelConfig, ParallelConfig
from parallel.planning.hardware import DEVICES
from parallel.planning.workload import Workload
from tests.processes import run_processes
from tests.tools.outcomes import Script
from train.config import REPOSITORY

STACK = {"num_layers": 2, "hidden_size": 128, "num_attention_heads": 4}
MODEL = ModelConfig.model_validate(
    {"vocab_size": 2048, "sequence_length": 256, "block_decoder": STACK, "token_decoder": STACK}
)
TOLERANCE = 0.1


def work(size: int, count: int, precision: Any = "fp32", **layout: Any) -> Workload:
    return Workload(MODEL, ParallelConfig.model_validate(layout), size, count, precision, on_gpu=False)


LAYOUTS = {
    1: [
        work(4, 1, zero_stage=0),
        work(4, 2, activation_checkpointing="layer"),
        work(4, 2, activation_checkpointing="selective"),
        work(4, 2, "bf16"),
        work(1, 1, zero_stage=0),
    ],
    2: [
        work(4, 2, data=2, zero_stage=1),
        work(4, 2, data=2, zero_stage=2),
        work(4, 2, data=2, zero_stage=3),
        work(8, 2, tensor=2, zero_stage=0),
        work(8, 2, tensor=2, zero_stage=0, block_parallel=True),
        work(2, 4, pipeline=2, zero_stage=0),
    ],
}


def allocated(works: list[Workload]) -> list[int]:
    """Gloo now and then frees its copies only during the next step: where it is used, the least of three."""
    return [min(allocated_bytes(one) for _ in range(1 if one.parallel.world_size == 1 else 3)) for one in works]


@pytest.mark.slow
@pytest.mark.parametrize("processes", LAYOUTS)
def test_predicted_memory_is_what_is_allocated(processes: int) -> None:
    """Where there is one stage, on either rank, which hold alike."""
    by_rank = run_processes(processes, allocated, LAYOUTS[processes])
    for number, one in enumerate(LAYOUTS[processes]):
        ranks = (
            range(processes)
            if one.parallel.pipeline > 1
            else [min(range(processes), key=lambda rank: by_rank[rank][number])]
        )
        for rank in ranks:
            predicted = predicted_bytes(one, rank)
            assert predicted == pytest.approx(by_rank[rank][number], rel=TOLERANCE), (describe(one), rank)


@pytest.mark.slow
def test_an_observation_has_all_its_numbers() -> None:
    seen = run_processes(1, observe, LAYOUTS[1][-1], 2)[0]
    assert seen.allocated == pytest.approx(predicted_bytes(LAYOUTS[1][-1], 0), rel=TOLERANCE)
    assert min(seen.resident, seen.kept) > seen.allocated / 2
    assert seen.step_seconds > 0


def test_reports() -> None:
    works = [LAYOUTS[1][0], *LAYOUTS[2][:2]]
    observed = [
        [Observation(2**20, 2**20, 2**20, seconds)] * one.parallel.world_size
        for one, seconds in zip(works, (1, 2, 3), strict=True)
    ]
    assert len(memory_table(works, observed)) == 2 + 3
    agreeing = [
        time_tables(works, seconds, DEVICES["cpu"])[-1].split(": ")[1] for seconds in ([1.0, 2.0, 3.0], [1.0, 3.0, 2.0])
    ]
    assert sorted(agreeing) == ["0 of 1 pairs", "1 of 1 pairs"]
    earlier = [Observation(1, 2, 3, step_seconds=1.0)]
    assert fastest(earlier, [Observation(0, 0, 0, step_seconds=2.0)]) == earlier
    assert fastest(earlier, [Observation(4, 5, 6, step_seconds=2.0)]) == [Observation(4, 5, 6, step_seconds=1.0)]


@pytest.mark.parametrize("content", ["", "[1]", '{"layout": [{"resident": 1}]}'])
def test_a_file_of_something_else_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    file = tmp_path / "measurements.json"
    file.write_text(content)
    benchmark = Script(REPOSITORY / "benchmarks" / "plan_against_measurement.py", monkeypatch, capsys)
    outcome = benchmark("--output", file)
    assert outcome.status == 2
    assert f"--output {file}" in outcome.errors[-1]
    assert file.read_text() == content
