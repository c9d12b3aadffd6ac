"""Measures the training step of any models, interleaved: benchmarks/train_step.py CONFIG... --output DIR.

Every model - configuration, variant, version of the project - is built by processes of its own. Then they take turns,
a step each, so that whatever else the machine does meets all alike; before and after each step its own process times a
large matrix product, the yardstick that the step is held against.
"""

import sys
from pathlib import Path

# Run as a script, the first entry of sys.path is this folder; the repository root must stand there instead.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import os
import shlex
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Self

# Megatron-core warns at import about optional libraries that this project does not use.
warnings.filterwarnings("ignore", module=r"megatron\.core")

import torch

from parallel.costs import forward_flops_per_token
from parallel.device_limits import DeviceLimits, measure_device_limits
from parallel.errors import ConfigurationError
from parallel.planning.search import largest_memory
from slurm.identity import free_port
from tools.command_line import exit_on_termination, make_output_folder, positive, run
from tools.output_file import check_output_file, write_output_file
from train.config import REPOSITORY, RunConfig
from train.config_file import load_config
from train.throughput import BACKWARD_FACTOR

WORKER = Path(__file__).with_name("train_step_worker.py")
GIB = 2**30
RECORD, TABLE = "train_step.json", "train_step.md"


@dataclass(frozen=True)
class Candidate:
    """What is measured.

    Attributes:
        name: configuration, variant and version.
        config: the run; its global batch is one step's.
        root: checkout whose modules run it.
    """

    name: str
    config: RunConfig
    root: Path

    @property
    def flops(self) -> float:
        """Model FLOPs of a step, recomputation and padding not counted."""
        return BACKWARD_FACTOR * forward_flops_per_token(self.config.model) * self.config.tokens_per_step

    @cached_property
    def planned_bytes(self) -> float:
        """Memory of the process that needs most, as tools/plan.py predicts it."""
        return largest_memory(self.config.workload).total


class Processes:
    """The processes of a candidate, which wait for commands; use it in a with statement."""

    def __init__(self, candidate: Candidate, threads: int) -> None:
        world = candidate.config.parallel.world_size
        port = free_port()
        # Without defaults: an older version does not know newer fields.
        values = candidate.config.model_dump_json(exclude_defaults=True)
        command = [sys.executable, str(WORKER), str(candidate.root), values]
        self._processes = []
        for rank in range(world):
            place = {
                "RANK": rank,
                "WORLD_SIZE": world,
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": max(1, threads // world),
            }
            environment = os.environ | {key: str(value) for key, value in place.items()}
            self._processes.append(
                subprocess.Popen(
                    command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
                )
            )
        self._name = candidate.name
        self.started: list[dict[str, float]] = []

    def ask(self, command: str) -> list[dict[str, float]]:
        """Has all processes do something; returns the answer of each rank."""
        for process in self._processes:
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # it has ended, and answers nothing
                process.stdin.write(command + "\n")
        return self._answers()

    def _answers(self) -> list[dict[str, float]]:
        answers = []
        for process in self._processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise ConfigurationError(
                    f"{self._name}: a process has ended, see its message above; without one it was out of memory"
                )
            answers.append(json.loads(line))
        return answers

    def __enter__(self) -> Self:
        try:
            self.started = self._answers()
        except ConfigurationError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.close()
        deadline = time.monotonic() + 20
        for process in self._processes:
            try:
                process.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()


@dataclass(frozen=True)
class StepResult:
    """What was measured of a candidate.

    Attributes:
        name: of the candidate.
        layout: of its processes.
        precision: train.precision.
        tokens: of a step.
        step_seconds: of each step, all ranks' slowest.
        optimizer_seconds: median part of it.
        tokens_per_second: at the median step.
        flops_per_second: model FLOPs at the median step, over all processes.
        fraction_of_peak: median over steps, of the yardstick around each of them.
        peak_fraction: of the fastest step, of the fastest yardstick of all candidates.
        memory_bytes: peak of the rank that takes most, beyond what it had before the model was built.
        planned_bytes: what tools/plan.py predicts of it.
        components: seconds of a step by component on rank 0; none until all steps of all candidates are measured.
    """

    name: str
    layout: dict[str, Any]
    precision: str
    tokens: int
    step_seconds: list[float]
    optimizer_seconds: float
    tokens_per_second: float
    flops_per_second: float
    fraction_of_peak: float
    peak_fraction: float
    memory_bytes: float
    planned_bytes: float
    components: dict[str, float]


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Measures training steps, interleaved. See docs/performance.md.")
    add = parser.add_argument
    add("configs", type=Path, nargs="+", metavar="CONFIG", help="YAML files of runs")
    add(
        "--variants",
        nargs="+",
        default=[""],
        metavar="OVERRIDES",
        help='each a string of overrides such as "train.micro_batch_size=4 parallel.tensor=2"; every configuration is '
        "measured in every variant. Unless one says so: parallel.data=1, train.micro_batch_size=1. A global batch that "
        "is not given is one micro-batch per data-parallel rank",
    )
    add("--against", nargs="+", default=[], metavar="COMMIT", help="measure other versions of the project too")
    add("--steps", type=positive, default=5, help="measured steps of each (default 5), after one that is not counted")
    add(
        "--threads",
        type=positive,
        default=len(os.sched_getaffinity(0)),
        help="CPU threads of each model, shared by its processes",
    )
    add("--output", type=Path, required=True, help="folder for train_step.json and train_step.md")
    return parser.parse_args()


def candidates(arguments: argparse.Namespace, roots: dict[str, Path]) -> list[Candidate]:
    """Configurations x variants x versions.

    Raises:
        ConfigurationError: one is not valid, or has more processes than there are GPUs, where there are any.
    """
    devices = torch.cuda.device_count()
    found = []
    for path in arguments.configs:
        for variant in arguments.variants:
            config = _of_one_round(path, _overrides(variant))
            world = config.parallel.world_size
            if 0 < devices < world:
                raise ConfigurationError(
                    f"the layout of {' '.join(filter(None, (path.stem, variant)))} has {world} processes, but there "
                    f"{'is 1 GPU' if devices == 1 else f'are {devices} GPUs'}; name --variants of at most {devices}"
                )
            for version, root in roots.items():
                found.append(Candidate(" ".join(filter(None, (path.stem, variant, version))), config, root))
                _ = found[-1].planned_bytes  # an activation budget that is too small is said now
    return found


def _overrides(variant: str) -> list[str]:
    try:
        return shlex.split(variant)
    except ValueError as error:
        raise ConfigurationError(f"--variants {variant}: {error}; close it") from None


def _of_one_round(path: Path, overrides: list[str]) -> RunConfig:
    """Loads a run for one process and single sequences, if nothing else is said.

    Its global batch, unless given, is one micro-batch for each data-parallel rank.
    """
    defaults = ["train.micro_batch_size=1", "parallel.data=1"]
    if not torch.cuda.is_available():
        defaults.append("train.precision=fp32")
    overrides = [*defaults, *overrides]
    values = dict(one.partition("=")[::2] for one in overrides)
    try:
        rows = int(values["train.micro_batch_size"]) * int(values["parallel.data"])
    except ValueError:
        return load_config(path, overrides)  # which says what is wrong with them
    return load_config(path, [f"train.global_batch_size={rows}", *overrides])


def measure(
    subjects: Sequence[Candidate], steps: int, threads: int, keep: Callable[[list[StepResult]], None]
) -> list[StepResult]:
    """Builds all candidates, lets them take turns, and sums up; keep is given the results after each round."""
    with ExitStack() as stack:
        processes = [stack.enter_context(Processes(candidate, threads)) for candidate in subjects]
        started = [group.started for group in processes]
        answers: list[list[list[dict[str, float]]]] = [[] for _ in subjects]
        for number in range(steps + 1):
            for candidate, group, own in zip(subjects, processes, answers, strict=True):
                answer = group.ask("step")
                if number:  # the first one warms up
                    own.append(answer)
                print(f"step {number}/{steps}  {answer[0]['step_seconds']:8.3f} s  {candidate.name}", flush=True)
            if number:
                parts = zip(subjects, answers, _best_rates(subjects, answers), started, strict=True)
                results = [_sum_up(*part) for part in parts]
                keep(results)
        components = [group.ask("components")[0] for group in processes]
    return [replace(one, components=split) for one, split in zip(results, components, strict=True)]


def _best_rates(subjects: Sequence[Candidate], answers: Sequence[list[list[dict[str, float]]]]) -> list[float]:
    """FLOP/s of the run's fastest product for each candidate: in its precision, on as many devices as it has."""
    rates = []
    for candidate in subjects:
        pairs = zip(subjects, answers, strict=True)
        alike = [own for other, own in pairs if other.config.train.precision == candidate.config.train.precision]
        found = [[rank["yardstick_flops_per_second"] for rank in answer] for own in alike for answer in own]
        if torch.cuda.is_available():
            rates.append(max(map(max, found)) * candidate.config.parallel.world_size)
        else:  # processes share the cores
            rates.append(max(map(sum, found)))
    return rates


def _sum_up(
    candidate: Candidate,
    answers: list[list[dict[str, float]]],
    best: float,
    started: list[dict[str, float]],
) -> StepResult:
    seconds = [max(rank["step_seconds"] for rank in answer) for answer in answers]
    yardsticks = [sum(rank["yardstick_flops_per_second"] for rank in answer) for answer in answers]
    median = statistics.median(seconds)
    growth = [last["peak_bytes"] - first["imports_bytes"] for last, first in zip(answers[-1], started, strict=True)]
    fractions = [candidate.flops / one / limit for one, limit in zip(seconds, yardsticks, strict=True)]
    return StepResult(
        name=candidate.name,
        layout=candidate.config.parallel.model_dump(mode="json"),
        precision=candidate.config.train.precision,
        tokens=candidate.config.tokens_per_step,
        step_seconds=seconds,
        optimizer_seconds=statistics.median(answer[0]["optimizer_seconds"] for answer in answers),
        tokens_per_second=candidate.config.tokens_per_step / median,
        flops_per_second=candidate.flops / median,
        fraction_of_peak=statistics.median(fractions),
        peak_fraction=candidate.flops / min(seconds) / best,
        memory_bytes=max(growth),
        planned_bytes=candidate.planned_bytes,
        components={},
    )


def report(results: Sequence[StepResult], limits: DeviceLimits) -> str:
    """A table of all candidates, the ratios to the first one, and where the time went."""
    columns = (
        "tokens/s | TFLOP/s | of product rate | best step | memory GiB | planned | median step s | times the first"
    )
    lines = [limits.describe(), "", f"| model | {columns} |", "|---" * 9 + "|"]
    first = results[0]
    for one in results:
        # Pairs of the same round met the same machine.
        rounds = zip(first.step_seconds, one.step_seconds, strict=True)
        ratio = statistics.median(theirs / own for theirs, own in rounds) * one.tokens / first.tokens
        lines.append(
            f"| {one.name} | {one.tokens_per_second:,.0f} | {one.flops_per_second / 1e12:.3f} | "
            f"{one.fraction_of_peak:.0%} | {one.peak_fraction:.0%} | {one.memory_bytes / GIB:.2f} | "
            f"{one.planned_bytes / GIB:.2f} | {statistics.median(one.step_seconds):.3f} | {ratio:.2f} |"
        )
    names = list(dict.fromkeys(name for one in results for name in one.components))
    lines += ["", "| seconds | " + " | ".join(one.name for one in results) + " |", "|---" * (len(results) + 1) + "|"]
    for name in names:
        cells = (f"{one.components[name]:.3f}" if name in one.components else "" for one in results)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _versions(commits: Sequence[str], folder: Path) -> dict[str, Path]:
    """Checkouts by name: this one, and beside it those of other commits.

    Raises:
        ConfigurationError: there is no such commit.
    """
    if not commits:
        return {"": REPOSITORY}
    return {"now": REPOSITORY} | {commit: _check_out(commit, Path(tempfile.mkdtemp(dir=folder))) for commit in commits}


def _check_out(commit: str, folder: Path) -> Path:
    """Lays another version of the project into a folder.

    Raises:
        ConfigurationError: there is no such commit.
    """
    archive = subprocess.run(["git", "-C", str(REPOSITORY), "archive", commit], capture_output=True)
    if archive.returncode:
        raise ConfigurationError(
            f"--against {commit}: {archive.stderr.decode().strip()}; name a commit of this project"
        )
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder


def _check_output(folder: Path) -> None:
    """Makes the folder of --output.

    Raises:
        ConfigurationError: it has results already, or none can be written there.
    """
    make_output_folder(folder)
    if (folder / RECORD).is_file():
        raise ConfigurationError(f"--output {folder} has a {RECORD} already; name another folder or remove that file")
    for name in (RECORD, TABLE):
        check_output_file(folder / name)


def _save(results: Sequence[StepResult], limits: DeviceLimits, folder: Path) -> None:
    record = {"limits": asdict(limits), "results": [asdict(one) for one in results]}
    write_output_file(folder / RECORD, json.dumps(record, indent=1) + "\n")


def main() -> None:
    """Measures and reports."""
    exit_on_termination()
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        subjects = candidates(arguments, _versions(arguments.against, Path(folder)))
        _check_output(arguments.output)
        torch.set_num_threads(arguments.threads)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if subjects[0].config.train.precision == "bf16" else torch.float32
        limits = measure_device_limits(device, dtype)
        torch.cuda.empty_cache()  # the models run in other processes
        results = measure(
            subjects, arguments.steps, arguments.threads, lambda found: _save(found, limits, arguments.output)
        )
    text = report(results, limits)
    _save(results, limits, arguments.output)
    write_output_file(arguments.output / TABLE, text)
    print(text)


if __name__ == "__main__":
    run(main, ConfigurationError)
