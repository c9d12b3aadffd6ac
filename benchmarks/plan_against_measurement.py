"""Holds tools/plan.py's predictions against real processes on CPU: memory of layouts, order of step times.

benchmarks/plan_against_measurement.py [--output FILE]: over gloo. For memory each layout runs in processes of its own:
what torch's allocator takes, and resident memory above that after imports, while freed memory goes back to the system.
For times all layouts take turns, several rounds of a few steps each, whose median counts. Efficiencies are fitted to
the layouts of one process, gloo is measured by itself, and what two processes take of each other's memory is fitted to
DP2 with ZeRO 1; all others are predicted.
"""

import sys
from pathlib import Path

# Run as a script, the first entry of sys.path is this folder; the repository root must stand there instead.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import multiprocessing
import statistics
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import combinations
from typing import Any

# Megatron-core warns at import of optional libraries that this project does not use, torch of names DeepSpeed calls.
warnings.filterwarnings("ignore", module=r"megatron\.core|torch\.distributed")

import torch
import torch.distributed
import torch.multiprocessing
from pydantic import BaseModel, ConfigDict, ValidationError

from benchmarks.allocations import return_freed_memory, traced_allocations, traced_residence
from benchmarks.layout_steps import LayoutProcesses, join_group, train_steps
from benchmarks.link_limits import Link
from parallel.config import ModelConfig, ParallelConfig
from parallel.device_limits import DeviceLimits, measure_device_limits
from parallel.errors import ConfigurationError
from parallel.host_memory import keep_freed_memory
from parallel.planning.calibration import Measured, fit
from parallel.planning.communication import Cluster
from parallel.planning.hardware import DEVICES, Device
from parallel.planning.memory import stage_memory
from parallel.planning.policies import stage_policies
from parallel.planning.search import evaluate
from parallel.planning.workload import Workload
from slurm.identity import free_port
from tools.command_line import exit_on_termination, make_output_folder, positive, run
from tools.output_file import check_output_file, write_output_file

MIB = 2**20
ROUNDS = 3
STEPS = 4  # of each layout and round, after one that is not counted
DISTINGUISHABLE = 1.15  # step times nearer to each other than this are no pair whose order counts
STACK = {"num_layers": 4, "hidden_size": 256, "num_attention_heads": 8}
MODEL = ModelConfig.model_validate(
    {"vocab_size": 8192, "sequence_length": 512, "block_decoder": STACK, "token_decoder": STACK}
)
WARM_UP = MODEL.model_copy(update={"vocab_size": 64, "sequence_length": 64})


class Memory(BaseModel):
    """Bytes of one process.

    Attributes:
        resident: peak of resident memory above that after imports, where freed memory is given back at once; training
            keeps it (parallel/host_memory.py), with gaps that depend on the order of allocations.
        kept: the same peak as training has it.
        allocated: peak of torch's allocator.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    resident: int
    kept: int
    allocated: int


class Speed(BaseModel):
    """What a machine did in one or more sittings.

    Attributes:
        limits: of one process.
        links: between two, once for each round.
        step_seconds: of each layout, of all rounds.
    """

    model_config = ConfigDict(extra="forbid")

    limits: DeviceLimits
    links: list[Link] = []
    step_seconds: dict[str, list[float]] = {}


class Record(BaseModel):
    """A file of measurements; memory has one entry for each rank of a layout."""

    model_config = ConfigDict(extra="forbid")

    memory: dict[str, list[Memory]] = {}
    speed: Speed | None = None


def layouts() -> list[Workload]:
    """What is measured: one, two and four processes, all kinds of parallelism and checkpointing."""
    cases: list[tuple[dict[str, Any], int, int, str]] = [
        ({"zero_stage": 0}, 4, 2, "fp32"),
        ({"zero_stage": 0, "activation_checkpointing": "selective"}, 4, 2, "fp32"),
        ({"zero_stage": 0, "activation_checkpointing": "layer"}, 4, 2, "fp32"),
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


def observe(work: Workload) -> Memory:
    """Trains for some steps in this process of a running group, with freed memory given back, kept, and traced."""
    train_steps(replace(work, model=WARM_UP, micro_batch_size=1), 1)  # loads what is loaded when needed
    return_freed_memory()
    with traced_residence() as resident:
        train_steps(work, 2)
    return_freed_memory()
    keep_freed_memory()
    with traced_residence() as kept:
        train_steps(work, 3)
    return Memory(resident=resident.peak, kept=kept.peak, allocated=allocated_bytes(work))


def allocated_bytes(work: Workload) -> int:
    """Most bytes that torch's allocator has given out in two training steps of this process of a running group."""
    with traced_allocations() as traced:
        train_steps(work, 2)
    return traced.peak


def _process(rank: int, port: int, work: Workload, answers: Any) -> None:
    join_group(rank, work.parallel.world_size, port)
    answers.put((rank, observe(work)))
    torch.distributed.destroy_process_group()


def measure_memory(work: Workload) -> list[Memory]:
    """Runs a layout in processes of its own; memory of each rank."""
    answers = multiprocessing.get_context("spawn").SimpleQueue()
    arguments = (free_port(), work, answers)
    torch.multiprocessing.spawn(_process, arguments, nprocs=work.parallel.world_size, daemon=True)
    found = dict(answers.get() for _ in range(work.parallel.world_size))
    return [found[rank] for rank in sorted(found)]


def measure_speed(works: Sequence[Workload], rounds: int, speed: Speed) -> Iterator[int]:
    """Lets all layouts take turns; adds their steps to those that are there, and yields after each round."""
    with ExitStack() as stack:
        sizes = sorted({work.parallel.world_size for work in works} | {2})
        processes = {size: stack.enter_context(LayoutProcesses(size)) for size in sizes}
        for number in range(rounds):
            speed.links.append(processes[2].link())
            for work in works:
                seconds = processes[work.parallel.world_size].steps(work, 1 + STEPS)[1:]
                speed.step_seconds.setdefault(describe(work), []).extend(seconds)
                middle = statistics.median(seconds)
                progress(f"round {number + 1}/{rounds}  {middle:6.2f} s  {describe(work)}")
            yield number


def progress(line: str) -> None:
    """Says how far the measurement is."""
    print(line, file=sys.stderr, flush=True)


def read_record(path: Path | None) -> Record:
    """Measurements of an earlier call; none if there is no such file.

    Raises:
        ConfigurationError: it is no file of measurements.
    """
    if path is None or not path.exists():
        return Record()
    try:
        return Record.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        raise ConfigurationError(f"--output {path} is no file of its measurements; name another one") from None


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


def memory_table(works: Sequence[Workload], record: Record) -> list[str]:
    """Predicted and measured memory of the stage that needs most of each layout.

    Of its ranks, which hold alike, the one with least counts: gloo frees its copies late on one or the other.
    """
    lines = [
        "| layout | predicted MiB | allocated | ratio | resident | ratio | resident, freed memory kept |",
        "|---|---|---|---|---|---|---|",
    ]
    for work in works:
        ranks = record.memory[describe(work)]
        per_stage = len(ranks) // work.parallel.pipeline
        predicted, first = max((predicted_bytes(work, rank), rank) for rank in range(0, len(ranks), per_stage))
        alike = ranks[first : first + per_stage]
        cells = [describe(work), f"{predicted / MIB:,.0f}"]
        for measured in (min(one.allocated for one in alike), min(one.resident for one in alike)):
            cells += [f"{measured / MIB:,.0f}", f"{predicted / measured:.2f}"]
        cells.append(f"{min(one.kept for one in alike) / MIB:,.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def calibrated(works: Sequence[Workload], speed: Speed) -> tuple[Device, Device]:
    """The CPU of one process, with efficiencies fitted to layouts of one; and that of several, which share its memory.

    What they take of each other is fitted to DP2 with ZeRO 1; gloo is what it was measured to be.
    """
    rates = {"fp32": speed.limits.flops_per_second, "bf16": speed.limits.flops_per_second}
    links = speed.links
    known = {
        "flops_per_second": rates,
        "bytes_per_second": speed.limits.bytes_per_second,
        "link_bytes_per_second": statistics.median(link.bytes_per_second for link in links),
        "link_latency": statistics.median(link.latency for link in links),
        "gather_cost": statistics.median(link.gather_cost for link in links),
    }
    measured = [Measured(work, statistics.median(speed.step_seconds[describe(work)])) for work in works]
    alone = [one for one in measured if one.work.parallel.world_size == 1]
    together = [one for one in measured if is_fitted(one.work.parallel) and one not in alone]
    single = fit(DEVICES["cpu"].model_copy(update=known), 8, None, alone)
    return single, fit(single, 8, None, together, ["memory_efficiency"])


def is_fitted(parallel: ParallelConfig) -> bool:
    """Whether constants are fitted to a layout: it is of one process, or of two that are the simplest there are."""
    return parallel.world_size == 1 or parallel == ParallelConfig(data=2, zero_stage=1)


def time_tables(works: Sequence[Workload], speed: Speed, devices: tuple[Device, Device]) -> list[str]:
    """Predicted and measured step times, and how many pairs of two-process layouts are in the right order.

    Args:
        works: the layouts.
        speed: of their steps.
        devices: of one process, and of several.
    """
    lines = ["| layout | step s | predicted | ratio |", "|---|---|---|---|"]
    pairs: list[tuple[float, float]] = []
    for work in works:
        measured = statistics.median(speed.step_seconds[describe(work)])
        predicted = evaluate(work, Cluster(devices[work.parallel.world_size > 1], 8, None)).time.total
        lines.append(f"| {describe(work)} | {measured:.2f} | {predicted:.2f} | {predicted / measured:.2f} |")
        if work.parallel.world_size == 2:
            pairs.append((measured, predicted))
    apart = [(a, b) for a, b in combinations(pairs, 2) if max(a[0], b[0]) > DISTINGUISHABLE * min(a[0], b[0])]
    agreeing = sum((a[0] < b[0]) == (a[1] < b[1]) for a, b in apart)
    return [*lines, "", f"order of two-process layouts that differ by more than 15 %: {agreeing} of {len(apart)} pairs"]


def main() -> None:
    """Measures, predicts and prints."""
    exit_on_termination()
    arguments = parse_arguments()
    works = [layouts()[number] for number in arguments.only or range(len(layouts()))]
    record = read_record(arguments.output)
    if arguments.output:
        make_output_folder(arguments.output.parent)
        check_output_file(arguments.output)
    if not arguments.times_only:
        for work in works:
            if describe(work) not in record.memory:
                record.memory[describe(work)] = measure_memory(work)
                save(record, arguments.output)
            progress(f"memory of {describe(work)}")
    timed = [work for work in works if work.precision == "fp32"]  # whose products the limits are of
    lacking = [work for work in timed if record.speed is None or describe(work) not in record.speed.step_seconds]
    if record.speed is None:
        torch.set_num_threads(1)
        record.speed = Speed(limits=measure_device_limits(torch.device("cpu"), torch.float32))
    if lacking or arguments.again:
        for _ in measure_speed(timed if arguments.again else lacking, arguments.rounds, record.speed):
            save(record, arguments.output)
    lines = [] if arguments.times_only else [*memory_table(works, record), ""]
    print("\n".join(lines + (time_tables(timed, record.speed, calibrated(timed, record.speed)) if timed else [])))


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Compares the planner with measurements on CPU processes.")
    add = parser.add_argument
    add("--output", type=Path, help="JSON file of measurements; what it holds is not measured again")
    numbers = range(len(layouts()))
    add("--only", type=int, nargs="+", metavar="N", choices=numbers, help="layouts to run, from 0")
    add("--rounds", type=positive, default=ROUNDS, help=f"in how many turns steps are measured (default {ROUNDS})")
    add("--again", action="store_true", help="measure the steps of all once more; the median of all counts")
    add("--times-only", action="store_true", help="do not measure memory, which takes long")
    return parser.parse_args()


def save(record: Record, path: Path | None) -> None:
    """Keeps measurements for the next call."""
    if path:
        write_output_file(path, record.model_dump_json(indent=1) + "\n")


if __name__ == "__main__":
    run(main, ConfigurationError)
