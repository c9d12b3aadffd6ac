"""The memory model against torch's allocator in real processes, and the benchmark that measures layouts in turn."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.layout_steps import LayoutProcesses
from benchmarks.link_limits import Link
from benchmarks.plan_against_measurement import (
    Memory,
    Record,
    Speed,
    allocated_bytes,
    calibrated,
    describe,
    measure_speed,
    memory_table,
    observe,
    predicted_bytes,
    read_record,
    save,
    time_tables,
)
from parallel.component_config import DecoderConfig
from parallel.config import ModelConfig, ParallelConfig
from parallel.device_limits import DeviceLimits
from parallel.errors import ConfigurationError
from parallel.planning import states
from parallel.planning.workload import Workload
from tests.processes import run_processes
from tests.tools.outcomes import Script
from train.config import REPOSITORY

STACK = {"num_layers": 2, "hidden_size": 128, "num_attention_heads": 4}
MODEL = ModelConfig.model_validate(
    {"vocab_size": 2048, "sequence_length": 256, "block_decoder": STACK, "token_decoder": STACK}
)
TOLERANCE = 0.1
MOST_TRIALS = 10
LIMITS = DeviceLimits("CPU", "float32", 9e10, 2e10)


def work(size: int, count: int, precision: Any = "fp32", **layout: Any) -> Workload:
    return Workload(MODEL, ParallelConfig.model_validate(layout), size, count, precision, on_gpu=False)


LAYOUTS = {
    1: [
        work(4, 1, zero_stage=0),
        work(4, 2, zero_stage=0, activation_checkpointing="layer"),
        work(4, 2, zero_stage=0, activation_checkpointing="selective"),
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
    return [least_allocated(one) for one in works]


def least_allocated(one: Workload) -> int:
    """Gloo's threads free their copies when they come to it, now and then only during the next step. That makes a
    peak larger, never smaller: while one is too large, all ranks take another."""
    limit = (1 + TOLERANCE) * predicted_bytes(one, torch.distributed.get_rank())
    least = allocated_bytes(one)
    for _ in range(MOST_TRIALS - 1):
        too_large = torch.tensor(int(least > limit))
        torch.distributed.all_reduce(too_large)
        if not too_large:
            break
        least = min(least, allocated_bytes(one))
    return least


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


# Of a model with short sequences, states take most; like all large models it is larger than the bucket.
SMALL_BUCKET = 2**19
WIDE = STACK | {"hidden_size": 256}
STATES = MODEL.model_copy(
    update={
        "vocab_size": 256,
        "sequence_length": 64,
        "block_decoder": DecoderConfig.model_validate(WIDE),
        "token_decoder": DecoderConfig.model_validate(WIDE),
    }
)
EARLY = [
    replace(work(1, count, precision, data=2, zero_stage=stage), model=STATES)
    for stage, count, precision in (
        (2, 1, "fp32"),
        (2, 2, "fp32"),
        (2, 1, "bf16"),
        (2, 2, "bf16"),
        (3, 1, "fp32"),
        (3, 2, "fp32"),
        (3, 2, "bf16"),
    )
]


def allocated_with_a_small_bucket(works: list[Workload]) -> list[int]:
    states.BUCKET_VALUES = SMALL_BUCKET
    return allocated(works)


@pytest.mark.slow
def test_memory_of_states_where_gradients_are_reduced_as_they_arise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "BUCKET_VALUES", SMALL_BUCKET)
    by_rank = run_processes(2, allocated_with_a_small_bucket, EARLY)
    for number, one in enumerate(EARLY):
        most = max(measured[number] for measured in by_rank)
        assert predicted_bytes(one, 0) == pytest.approx(most, rel=TOLERANCE), describe(one)


@pytest.mark.slow
def test_an_observation_has_all_its_numbers() -> None:
    seen = run_processes(1, observe, LAYOUTS[1][-1])[0]
    assert seen.allocated == pytest.approx(predicted_bytes(LAYOUTS[1][-1], 0), rel=TOLERANCE)
    assert min(seen.resident, seen.kept) > seen.allocated / 2


@pytest.mark.slow
def test_layouts_take_turns_in_processes_that_stay(capsys: pytest.CaptureFixture[str]) -> None:
    """What an earlier measurement left is kept."""
    works = [LAYOUTS[1][-1], work(1, 1, data=2), work(1, 1, tensor=2, zero_stage=0)]
    earlier = {describe(works[0]): [1.0] * 4}
    speed = Speed(limits=LIMITS, links=[Link(1e9, 1e-3, 0.75)], step_seconds=earlier)
    assert list(measure_speed(works, 2, speed)) == [0, 1]
    assert [len(speed.step_seconds[describe(one)]) for one in works] == [12, 8, 8]
    assert all(second > 0 for seconds in speed.step_seconds.values() for second in seconds)
    assert len(speed.links) == 3
    assert all(1e7 < link.bytes_per_second < 1e11 and 0 <= link.latency < 1 for link in speed.links)
    assert capsys.readouterr().err.splitlines()[0].startswith("round 1/2")


@pytest.mark.slow
def test_a_process_that_ends_is_said() -> None:
    impossible = work(1, 1, tensor=2)  # of two processes
    with LayoutProcesses(1) as processes, pytest.raises(ConfigurationError, match="a process has ended"):
        processes.steps(impossible, 1)


def test_reports(tmp_path: Path) -> None:
    works = [LAYOUTS[1][0], *LAYOUTS[2][:2]]
    link = Link(bytes_per_second=2e9, latency=1e-4, gather_cost=0.75)
    speed = Speed(limits=LIMITS, links=[link])
    memory = Memory(resident=2**20, kept=2**20, allocated=2**20)
    record = Record(memory={describe(one): [memory] * one.parallel.world_size for one in works}, speed=speed)
    assert len(memory_table(works, record)) == 2 + 3
    agreeing = []
    for seconds in ([1.0, 2.0, 3.0], [1.0, 3.0, 2.0]):
        speed.step_seconds = {describe(one): [0.1, second, 9.0] for one, second in zip(works, seconds, strict=True)}
        devices = calibrated(works, speed)
        agreeing.append(time_tables(works, speed, devices)[-1].split(": ")[1])
    assert agreeing == ["1 of 1 pairs", "0 of 1 pairs"]
    for device in devices:
        assert (device.link_bytes_per_second, device.link_latency, device.gather_cost) == (2e9, 1e-4, 0.75)
    save(record, tmp_path / "record.json")
    assert read_record(tmp_path / "record.json") == record


@pytest.mark.parametrize("content", ["", "[1]", '{"memory": {"layout": [{"resident": 1}]}}'])
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
