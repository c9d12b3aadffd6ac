"""Finds the best layout before a run: tools/plan.py CONFIG --gpus N --gpu h100-80g. See docs/planning.md."""

import sys
from pathlib import Path

# Run as a script, the first entry of sys.path is this folder; the repository root must stand there instead.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import math
import re
import shlex
import warnings
from collections.abc import Collection
from dataclasses import replace
from typing import Any

# Megatron-core warns at import about optional libraries that this project does not use.
warnings.filterwarnings("ignore", module=r"megatron\.core")

import yaml
from pydantic import ValidationError

from evaluation.throughput.equal_budget import Budget, Setting, best_choice, choice_table, judge, parse_budget
from parallel.config import ParallelConfig
from parallel.errors import ConfigurationError
from parallel.planning.calibration import (
    Benchmark,
    BenchmarkEntry,
    Constants,
    Measured,
    constants_text,
    fit,
    has_constants,
    read_benchmark,
    read_constants,
)
from parallel.planning.communication import Cluster
from parallel.planning.hardware import DEVICES, NETWORKS, NO_NETWORK
from parallel.planning.report import explanation, plan_table, plan_values, why_nothing_fits, yaml_snippet
from parallel.planning.search import Plan, Search, Training, search
from parallel.planning.workload import Workload
from tools.command_line import positive, run
from tools.output_file import check_output_file, write_output_file
from train.config import REPOSITORY, RunConfig
from train.config_file import load_config
from train.model_table import run_files

PAPER_LOSSES = Path(__file__).with_name("paper_losses.yaml")
PAPER_TOKENS = 300e9
WITHOUT_LAYOUT = ("parallel={}", "train.micro_batch_size=1", "train.compile_layers=false")


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Lists the layouts of a run on so many GPUs, best first: memory per process, time of a step, MFU, "
        "hours. Several runs: which model for a training and an inference budget."
    )
    add = parser.add_argument
    add("configs", nargs="*", type=Path, metavar="CONFIG", help="configuration of a run; its own layout is ignored")
    add("--gpus", type=positive, metavar="N", help="processes, one per GPU; all are used")
    add("--gpu", choices=sorted(DEVICES), default="h100-80g", help="kind of device (default h100-80g)")
    add("--network", choices=[NO_NETWORK, *NETWORKS], help="between nodes (default infiniband-400 beyond one node)")
    add("--gpus-per-node", type=positive, default=8, metavar="N", help="GPUs that share a node (default 8)")
    add("--constants", type=Path, metavar="FILE", help="constants of --calibrate instead of --gpu's")
    add("--tokens", type=float, default=PAPER_TOKENS, metavar="T", help="tokens that hours are for (default 300e9)")
    add("--top", type=positive, default=10, metavar="N", help="layouts to show (default 10)")
    add("--explain", action="store_true", help="memory and time of the best layout by component")
    add("--json", action="store_true", help="print JSON")
    add("--train-budget", metavar="B", help="FLOPs or GPU-hours, such as 8.6e19FLOP or 5000h")
    add("--inference-budget", metavar="B", help="per generated token: FLOPs or time, such as 1e9FLOP or 0.05ms")
    add("--setting", default="2048/128", metavar="P/N", help="prompt and new tokens of inference (default 2048/128)")
    add("--batch-size", type=positive, default=1, metavar="B", help="sequences at a time of inference (default 1)")
    add("--losses", nargs="+", default=[], metavar="NAME=L", help="losses of models; default: the paper's, table 1")
    add("--calibrate", type=Path, metavar="JSON", help="fit constants to the results of benchmarks/train_step.py")
    add("--output", type=Path, metavar="FILE", help="file for the constants of --calibrate")
    return parser.parse_args()


def main() -> None:
    """Plans, chooses or calibrates."""
    arguments = parse_arguments()
    if arguments.calibrate:
        calibrate(arguments)
        return
    if not arguments.configs:
        raise ConfigurationError("no CONFIG is given; name one, such as configs/paper/block_main_b4_1.2b.yaml")
    if arguments.gpus is None:
        raise ConfigurationError("--gpus is missing; say how many GPUs there are, such as --gpus 8")
    if not 0.0 < arguments.tokens < math.inf:
        raise ConfigurationError(f"--tokens={arguments.tokens:g} is not positive and finite; the paper trains on 300e9")
    chosen_setting(arguments.setting, arguments.batch_size)  # a mistake in it is said even where it is not needed
    cluster = chosen_cluster(arguments)
    runs = named_runs(arguments.configs)
    if len(runs) > 1 or arguments.train_budget or arguments.inference_budget or arguments.losses:
        compare(arguments, cluster, runs)
    else:
        plan(arguments, cluster, next(iter(runs.values())))


def chosen_cluster(arguments: argparse.Namespace) -> Cluster:
    """Device and network of the command line.

    Raises:
        ConfigurationError: more than a node, and no network between nodes.
    """
    constants = read_constants(arguments.constants) if arguments.constants else None
    device = constants.device if constants else DEVICES[arguments.gpu]
    if arguments.network == NO_NETWORK:
        if arguments.gpus > arguments.gpus_per_node:
            raise ConfigurationError(
                f"--network={NO_NETWORK} has no way between nodes, but --gpus={arguments.gpus} are more than "
                f"--gpus-per-node={arguments.gpus_per_node}; name one of {', '.join(NETWORKS)}"
            )
        return Cluster(device, arguments.gpus_per_node, None)
    own = constants.network if constants else None
    network = NETWORKS[arguments.network] if arguments.network else own or NETWORKS["infiniband-400"]
    return Cluster(device, arguments.gpus_per_node, network)


def named_runs(paths: list[Path]) -> dict[str, RunConfig]:
    """Runs by the names of their files.

    Raises:
        ConfigurationError: two have the same.
    """
    runs = {path.stem: load_config(path, WITHOUT_LAYOUT) for path in paths}
    if len(runs) < len(paths):
        raise ConfigurationError(f"two of {', '.join(map(str, paths))} have the same name; rename a file")
    return runs


def training_of(config: RunConfig) -> Training:
    """What the planner is asked to lay out."""
    train = config.train
    return Training(config.model, train.global_batch_size, train.precision, config.optimizer.decay == "all")


def plan(arguments: argparse.Namespace, cluster: Cluster, config: RunConfig) -> None:
    """Shows the best layouts of one run.

    Raises:
        ConfigurationError: none fits.
    """
    found = search(training_of(config), cluster, arguments.gpus)
    if not found.plans:
        raise ConfigurationError(why_nothing_fits(found, cluster, arguments.gpus))
    shown = found.plans[: arguments.top]
    if arguments.json:
        print(json.dumps([plan_values(one, arguments.tokens) for one in shown], indent=1))
        return
    device = cluster.device
    print(
        f"{config.run.name} on {arguments.gpus} x {device.name}: {len(found.plans)} layouts fit into "
        f"{device.memory_gib - device.reserved_gib:.1f} of {device.memory_gib:.1f} GiB; hours are to "
        f"{arguments.tokens:.3g} tokens"
    )
    lines = ["", *plan_table(shown, arguments.tokens), ""]
    if arguments.explain:
        lines += [*explanation(shown[0]), ""]
    print("\n".join([*lines, *yaml_snippet(shown[0])]))


def compare(arguments: argparse.Namespace, cluster: Cluster, runs: dict[str, RunConfig]) -> None:
    """Says which of several models to train for the budgets."""
    budgets = chosen_budgets(arguments)
    losses, setting = chosen_losses(arguments.losses, runs), chosen_setting(arguments.setting, arguments.batch_size)
    choices = []
    for name, config in runs.items():
        training = training_of(config)
        best = _best(search(training, cluster, arguments.gpus))
        choices.append(judge(name, training, best, arguments.tokens, setting, cluster.device, budgets, losses))
    if arguments.json:
        print(json.dumps([vars(one) for one in choices], indent=1))
        return
    print("\n".join(choice_table(choices, arguments.tokens)))
    best_one = best_choice(choices)
    if best_one is not None:
        print(f"\nlowest loss within the budgets: {best_one.name}")
    else:
        print("\nno model with a known loss is within the budgets")


def _best(found: Search) -> Plan | None:
    return found.plans[0] if found.plans else None


def chosen_budgets(arguments: argparse.Namespace) -> tuple[Budget | None, Budget | None]:
    """Budgets for training and inference."""
    train, inference = arguments.train_budget, arguments.inference_budget
    return (
        parse_budget("--train-budget", train, ("FLOP", "h")) if train else None,
        parse_budget("--inference-budget", inference, ("FLOP", "ms", "s")) if inference else None,
    )


def chosen_losses(given: list[str], names: Collection[str]) -> dict[str, float]:
    """The paper's losses, and over them those of the command line.

    Raises:
        ConfigurationError: one is not NAME=NUMBER, or no model that is compared has that name.
    """
    losses: dict[str, float] = yaml.safe_load(PAPER_LOSSES.read_text(encoding="utf-8"))
    for one in given:
        name, separator, value = one.partition("=")
        try:
            losses[name] = float(value)
        except ValueError:
            separator = ""
        if not separator or not 0.0 < losses[name] < math.inf:
            raise ConfigurationError(f"--losses {one} is not NAME=LOSS, such as block_main_b4_85=2.75")
        if name not in names:
            raise ConfigurationError(f"--losses {one}: no model is called {name}; there are {', '.join(names)}")
    return losses


def chosen_setting(text: str, batch_size: int) -> Setting:
    """Prompt and new tokens of inference.

    Raises:
        ConfigurationError: they are not two numbers.
    """
    prompt, _, new = text.partition("/")
    if not (prompt.isdecimal() and new.isdecimal() and int(prompt) > 0 and int(new) > 1):
        raise ConfigurationError(f"--setting={text} is not PROMPT/NEW, with at least 2 new tokens, such as 2048/128")
    return Setting(batch_size, int(prompt), int(new))


def calibrate(arguments: argparse.Namespace) -> None:
    """Fits the constants of a device to a benchmark and writes them.

    Raises:
        ConfigurationError: there is no file to write, or the benchmark cannot be read, or is of another kind of device.
    """
    if arguments.output is None:
        raise ConfigurationError("--calibrate needs --output; name the file that --constants is to read")
    check_output_file(arguments.output)
    if arguments.output.is_file() and arguments.output.stat().st_size and not has_constants(arguments.output):
        raise ConfigurationError(
            f"--output {arguments.output} is there and is no file of constants; name another file or remove it"
        )
    benchmark = read_benchmark(arguments.calibrate)
    possible = kinds_of_device(benchmark)
    if arguments.gpu not in possible:
        raise ConfigurationError(
            f"--gpu {arguments.gpu} is not what {arguments.calibrate} was measured on, which is {benchmark.device}; "
            f"use --gpu {' or '.join(possible)}, or run the benchmark on the other device"
        )
    paths = {path.stem: path for path in [*run_files(REPOSITORY / "configs"), *arguments.configs]}
    own = [one for one in benchmark.entries if one.is_of_this_version]
    measured = [Measured(measured_workload(one, benchmark, paths), one.step_seconds) for one in own]
    # The limits are those of one precision.
    measured = [one for one in measured if one.work.precision == benchmark.precision]
    if benchmark.on_cpu:  # where several processes share what the limits were measured with
        measured = [one for one in measured if one.work.parallel.world_size == 1]
    if not measured:
        raise ConfigurationError(
            f"--calibrate {arguments.calibrate} has no step to fit to: one of this version of the project in "
            f"{benchmark.precision}{' with one process' * benchmark.on_cpu}; run the benchmark again"
        )
    start = DEVICES[arguments.gpu]
    rates = start.flops_per_second | {benchmark.precision: benchmark.flops_per_second}
    limits: dict[str, Any] = {"flops_per_second": rates, "bytes_per_second": benchmark.bytes_per_second}
    device = fit(start.model_copy(update=limits), arguments.gpus_per_node, None, measured)
    write_output_file(arguments.output, constants_text(Constants(device=device)))
    print(f"fitted {device.name} to {len(measured)} of {len(benchmark.entries)} measured steps: {arguments.output}")


def kinds_of_device(benchmark: Benchmark) -> list[str]:
    """Values of --gpu that a benchmark may have been measured on: of a GPU that is not known, all GPUs."""
    if benchmark.on_cpu:
        return ["cpu"]
    gpus = sorted(DEVICES.keys() - {"cpu"})
    found = re.search(r"\b([AH]\d+)\b(?:.*?\b(\d+)GB\b)?", benchmark.device)
    if found is None:
        return gpus
    kind, memory = found[1].lower(), found[2]
    alike = [name for name in gpus if name.startswith(f"{kind}-")]
    return [name for name in alike if name == f"{kind}-{memory}g"] or alike or gpus


def measured_workload(entry: BenchmarkEntry, benchmark: Benchmark, paths: dict[str, Path]) -> Workload:
    """What a line of a benchmark has run: its name is a configuration's, followed by overrides.

    Raises:
        ConfigurationError: the configuration is not known.
    """
    stem, *words = shlex.split(entry.name)
    if stem not in paths:
        raise ConfigurationError(f"--calibrate: no configuration is called {stem}; name its file as CONFIG too")
    overrides = [word for word in words if "=" in word]
    of_model = [word for word in overrides if word.startswith("model.")]
    length = load_config(paths[stem], of_model).model.sequence_length
    batch = entry.tokens // length
    if not batch:
        raise ConfigurationError(
            f"--calibrate: a step of {entry.name} has tokens={entry.tokens}, less than the {length} of one sequence; "
            "run the benchmark again"
        )
    try:
        layout = ParallelConfig.model_validate(entry.layout)
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        raise ConfigurationError(
            f"--calibrate: the layout of {entry.name} has {place}, which this version does not know; run the "
            "benchmark again"
        ) from None
    defaults = [
        "train.micro_batch_size=1",
        f"train.global_batch_size={batch}",
        *(f"parallel.{name}={json.dumps(value)}" for name, value in layout.model_dump(mode="json").items()),
    ]
    # Older benchmarks do not tell it: what the configuration has, but on a CPU fp32.
    precision = entry.precision or ("fp32" if benchmark.on_cpu else None)
    if precision:
        defaults.append(f"train.precision={precision}")
    work = load_config(paths[stem], [*defaults, *overrides]).workload
    return replace(work, on_gpu=not benchmark.on_cpu)  # a configuration's is of the device of this machine


if __name__ == "__main__":
    run(main, ConfigurationError)
