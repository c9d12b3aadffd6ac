"""Holds tools/plan.py's predictions against real processes on CPU: memory of layouts, order of step times.

benchmarks/plan_against_measurement.py [--output FILE]: each layout runs in processes of its own, over gloo. Memory is
what torch's allocator takes, and resident memory above that after imports, while freed memory goes back to the system.
The constants for times are fitted to the layouts of one process and to DP2 with ZeRO 1; all others are predicted.
"""

import sys
from pathlib import Path

# Run as a script, the first entry of sys.path is this folder; the repository root must stand there instead.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import gc
import json
import multiprocessing
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

# Megatron-core warns at import about optional libraries that this project does not use.
warnings.filterwarnings("ignore", module=r"megatron\.core")

import torch
import torch.distributed
import torch.multiprocessing

from benchmarks.allocations import return_freed_memory, traced_allocations, traced_residence
from parallel.config import ModelConfig, ParallelConfig
from parallel.device_limits import measure_device_limits
from parallel.errors import ConfigurationError
from parallel.host_memory import keep_freed_memory
from parallel.inputs import MicroBatch
from parallel.planning.calibration import Measured, fit
from parallel.planning.communication import Cluster
from parallel.planning.hardware import DEVICES, Device
from parallel.planning.memory import stage_memory
from parallel.planning.policies import stage_policies
from parallel.planning.search import evaluate
from parallel.planning.workload import Workload
from parallel.stage import build_stage
from parallel.topology import initialize_topology, start_process_group
from slurm.identity import free_port
from tools.command_line import exit_on_termination, make_output_folder, run
from train.config import OptimizerConfig
from train.step import StepEngine

MIB = 2**20
STEPS = 4
DISTINGUISHABLE = 1.15  # step times nearer to each other than this are no pair whose order counts
STACK = {"num_layers": 4, "hidden_size": 256, "num_attention_heads": 8}
MODEL = ModelConfig.model_validate(
    {"vocab_size": 8192, "sequence_length": 512, "block_decoder": STACK, "token_decoder": STACK}
)
WARM_UP = MODEL.model_copy(update={"vocab_size": 64, "sequence_length": 64})


@dataclass(frozen=True)
class Observation:
    """What one process measured.

    Attributes:
        resident: peak of resident memory above that after imports, in bytes, where freed memory is given back at once;
            training keeps it (parallel/host_memory.py), with gaps that depend on the order of allocations.
        kept: the same peak as training has it.
        allocated: peak of torch's allocator, in bytes.
        step_seconds: of the fastest step after the first: what else the machine does only adds to them.
    """

    resident: int
    kept: int
    allocated: int
    step_seconds: float


def layouts() -> list[Workload]:
    """What is measured: one, two and four processes, all kinds of parallelism and checkpointing."""
    cases: list[tuple[dict[str, Any], int, int, str]] = [
        ({"zero_stage": 0}, 4, 2, "fp32"),
        ({"zero_stage": 1, "activation_checkpointing": "selective"}, 4, 2, "fp32"),
        ({"zero_stage": 1, "activation_checkpointing": "layer"}, 4, 2, "fp32"),
        ({"zero_stage": 1}, 2, 2, "bf16"),
        ({"data": 2, "zero_stage": 1}, 2, 2, "fp32"),
        ({"data": 2, "zero_stage": 2}, 2, 2, "fp32"),
        ({"data": 2, "zero_stage": 3}, 2, 2, "fp32"),
        ({"tensor": 2, "zero_stage": 0}, 4, 2, "fp32"),
        ({"tensor": 2, "zero_stage": 0, "sequence_parallel": True}, 4, 2, "fp32"),
        ({"tensor": 2, "zero_stage": 0, "activation_checkpointing": "selective"}, 4, 2, "fp32"),
        ({"tensor": 2, "zero_stage": 0, "block_parallel": True}, 4, 2, "fp32"),
        ({"pipeline": 2, "zero_stage": 0}, 1, 8, "fp32"),
        ({"pipeline": 2, "zero_stage": 0, "activation_checkpointing": "layer"}, 2, 4, "fp32"),
        ({"pipeline": 2, "data": 2, "zero_stage": 1}, 1, 4, "fp32"),
    ]
    return [
        Workload(MODEL, ParallelConfig(**parallel), size, count, precision, on_gpu=False)  # type: ignore[arg-type]
        for parallel, size, count, precision in cases
    ]


def observe(work: Workload, steps: int = STEPS, traces_allocator: bool = True) -> Observation:
    """Trains for some steps in this process of a running group, first undisturbed, then with the allocator traced."""
    place = initialize_topology(work.parallel)
    _train(replace(work, model=WARM_UP, micro_batch_size=1), place.pipeline_rank, 1)  # loads what is loaded when needed
    return_freed_memory()
    with traced_residence() as resident:
        _train(work, place.pipeline_rank, 2)
    return_freed_memory()
    keep_freed_memory()
    with traced_residence() as kept:
        seconds = _train(work, place.pipeline_rank, steps)
    allocated = allocated_bytes(work) if traces_allocator else 0
    return Observation(resident.peak, kept.peak, allocated, min(seconds[1:]))


def allocated_bytes(work: Workload) -> int:
    """Most bytes that torch's allocator has given out in two training steps of this process of a running group."""
    place = initialize_topology(work.parallel)
    with traced_allocations() as traced:
        _train(work, place.pipeline_rank, 2)
    return traced.peak


def _train(work: Workload, stage_number: int, steps: int) -> list[float]:
    dtype = torch.bfloat16 if work.precision == "bf16" else torch.float32
    stage = build_stage(work.model, work.parallel, dtype, policies=stage_policies(work, stage_number))
    engine = StepEngine(
        stage, work.parallel, OptimizerConfig(learning_rate=1e-4), work.precision, work.micro_batch_size
    )
    ids = torch.randint(work.model.vocab_size, (work.micro_batch_size, work.model.sequence_length))
    batches = [MicroBatch(ids, torch.ones_like(ids, dtype=torch.bool))] * work.num_micro_batches
    seconds = []
    for _ in range(steps):
        gc.collect()  # what a step leaves in cycles would otherwise be there or not in the next one
        started = time.perf_counter()
        engine.accumulate(batches)
        engine.update(1e-4)
        seconds.append(time.perf_counter() - started)
    engine.engine.destroy()
    return seconds


def _process(rank: int, port: int, work: Workload, traces_allocator: bool, answers: Any) -> None:
    size = work.parallel.world_size
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    start_process_group()
    answers.put((rank, observe(work, traces_allocator=traces_allocator)))
    torch.distributed.destroy_process_group()


def run_layout(work: Workload, traces_allocator: bool) -> list[Observation]:
    """Runs a layout in processes of its own; one observation per rank."""
    answers = multiprocessing.get_context("spawn").SimpleQueue()
    arguments = (free_port(), work, traces_allocator, answers)
    torch.multiprocessing.spawn(_process, arguments, nprocs=work.parallel.world_size, daemon=True)
    found = dict(answers.get() for _ in range(work.parallel.world_size))
    return [found[rank] for rank in sorted(found)]


def fastest(before: list[Observation] | None, now: list[Observation]) -> list[Observation]:
    """The present measurement, with the steps of an earlier one where those were faster, and its memory if need be."""
    if before is None:
        return now
    return [
        replace(one if one.allocated else other, step_seconds=min(one.step_seconds, other.step_seconds))
        for one, other in zip(now, before, strict=True)
    ]


def read_observations(path: Path) -> dict[str, list[Observation]]:
    """Measurements of an earlier call, by layout; none if there is no such file.

    Raises:
        ConfigurationError: it is no file of measurements.
    """
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return {name: [Observation(**one) for one in ranks] for name, ranks in values.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        raise ConfigurationError(f"--output {path} is no file of its measurements; name another one") from None


def write_observations(path: Path, observed: Mapping[str, list[Observation]]) -> None:
    """Keeps measurements for the next call."""
    values = {name: [asdict(one) for one in ranks] for name, ranks in observed.items()}
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def predicted_bytes(work: Workload, rank: int) -> float:
    """Peak that the memory model says for a rank."""
    stage = rank // (work.parallel.tensor * work.parallel.data)
    return stage_memory(work, stage, stage_policies(work, stage)).total


def describe(work: Workload) -> str:
    """A layout in a few words."""
    parallel = work.parallel
    sequence = "+SP" if parallel.sequence_parallel else "+blocks" if parallel.block_parallel else ""
    return (
        f"TP{parallel.tensor}{sequence} PP{parallel.pipeline} DP{parallel.data} ZeRO {parallel.zero_stage}, "
        f"{parallel.activation_checkpointing}, {work.num_micro_batches} x {work.micro_batch_size}, {work.precision}"
    )


def memory_table(works: Sequence[Workload], observed: Sequence[list[Observation]]) -> list[str]:
    """Predicted and measured memory of the stage that needs most of each layout.

    Of its ranks, which hold alike, the one with least counts: gloo frees its copies late on one or the other.
    """
    lines = [
        "| layout | predicted MiB | allocated | ratio | resident | ratio | resident, freed memory kept |",
        "|---|---|---|---|---|---|---|",
    ]
    for work, ranks in zip(works, observed, strict=True):
        per_stage = len(ranks) // work.parallel.pipeline
        predicted, first = max((predicted_bytes(work, rank), rank) for rank in range(0, len(ranks), per_stage))
        alike = ranks[first : first + per_stage]
        cells = [describe(work), f"{predicted / MIB:,.0f}"]
        for measured in (min(one.allocated for one in alike), min(one.resident for one in alike)):
            cells += [f"{measured / MIB:,.0f}", f"{predicted / measured:.2f}"]
        cells.append(f"{min(one.kept for one in alike) / MIB:,.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def calibrated(works: Sequence[Workload], seconds: Sequence[float]) -> Device:
    """A CPU with measured limits, efficiencies fitted to the layouts of one process, and the speed of gloo to DP2."""
    torch.set_num_threads(1)
    limits = measure_device_limits(torch.device("cpu"), torch.float32)
    rates = {"fp32": limits.flops_per_second, "bf16": limits.flops_per_second}
    device = DEVICES["cpu"].model_copy(update={"flops_per_second": rates, "bytes_per_second": limits.bytes_per_second})
    measured = [Measured(work, one) for work, one in zip(works, seconds, strict=True)]
    return fit(device, 8, None, [one for one in measured if is_fitted(one.work.parallel)])


def is_fitted(parallel: ParallelConfig) -> bool:
    """Whether constants are fitted to a layout: it is of one process, or of two that are the simplest there are."""
    return parallel.world_size == 1 or parallel == ParallelConfig(data=2, zero_stage=1)


def time_tables(works: Sequence[Workload], seconds: Sequence[float], device: Device) -> list[str]:
    """Predicted and measured step times, and how many pairs of two-process layouts are in the right order."""
    cluster = Cluster(device, 8, None)
    lines = ["| layout | step s | predicted | ratio |", "|---|---|---|---|"]
    pairs: list[tuple[float, float]] = []
    for work, measured in zip(works, seconds, strict=True):
        predicted = evaluate(work, cluster).time.total
        lines.append(f"| {describe(work)} | {measured:.2f} | {predicted:.2f} | {predicted / measured:.2f} |")
        if work.parallel.world_size == 2:
            pairs.append((measured, predicted))
    apart = [(a, b) for a, b in combinations(pairs, 2) if max(a[0], b[0]) > DISTINGUISHABLE * min(a[0], b[0])]
    agreeing = sum((a[0] < b[0]) == (a[1] < b[1]) for a, b in apart)
    return [*lines, "", f"order of two-process layouts that differ by more than 15 %: {agreeing} of {len(apart)} pairs"]


def main() -> None:
    """Measures, predicts and prints."""
    exit_on_termination()
    parser = argparse.ArgumentParser(description="Compares the planner with measurements on CPU processes.")
    parser.add_argument("--output", type=Path, help="JSON file of measurements; what it holds is not measured again")
    numbers = range(len(layouts()))
    parser.add_argument("--only", type=int, nargs="+", metavar="N", choices=numbers, help="layouts to run, from 0")
    parser.add_argument("--again", action="store_true", help="measure all once more; the fastest steps count")
    parser.add_argument("--times-only", action="store_true", help="do not trace the allocator, which takes long")
    arguments = parser.parse_args()
    works = layouts()
    works = [works[number] for number in arguments.only or range(len(works))]
    observed = []
    known: dict[str, list[Observation]] = {}
    if arguments.output:
        make_output_folder(arguments.output.parent)
        known = read_observations(arguments.output)
    for work in works:
        lacks = describe(work) not in known or not (arguments.times_only or known[describe(work)][0].allocated)
        if lacks or arguments.again:
            known[describe(work)] = fastest(known.get(describe(work)), run_layout(work, not arguments.times_only))
            if arguments.output:
                write_observations(arguments.output, known)
        observed.append(known[describe(work)])
        print(f"measured {describe(work)}", file=sys.stderr, flush=True)
    seconds = [max(one.step_seconds for one in ranks) for ranks in observed]
    device = calibrated(works, seconds)
    memory = [] if arguments.times_only else [*memory_table(works, observed), ""]
    print("\n".join([*memory, *time_tables(works, seconds, device)]))


if __name__ == "__main__":
    run(main, ConfigurationError)
