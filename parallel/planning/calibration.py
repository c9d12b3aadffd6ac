"""Constants from a benchmark on the user's own machine (benchmarks/train_step.py)."""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from parallel.errors import ConfigurationError
from parallel.planning.communication import Cluster
from parallel.planning.hardware import Device, Network
from parallel.planning.search import evaluate
from parallel.planning.workload import Workload

# Fitted one after the other, each over a range of factors; three rounds are enough for them to settle.
FITTED = ("product_efficiency", "memory_efficiency", "attention_efficiency", "link_bytes_per_second")
ROUNDS = 3
FACTORS = [1.15**step for step in range(-12, 13)]


class Constants(BaseModel):
    """A file of constants: what --constants reads."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: Device
    network: Network | None = None


@dataclass(frozen=True)
class Measured:
    """A layout with the seconds that its steps took."""

    work: Workload
    step_seconds: float


def read_constants(path: Path) -> Constants:
    """Reads a file of constants.

    Raises:
        ConfigurationError: it is missing or no such file.
    """
    try:
        return Constants.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValidationError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise ConfigurationError(
            f"--constants {path} cannot be read ({reason}); write one with tools/plan.py --calibrate"
        ) from None


def write_constants(path: Path, constants: Constants) -> None:
    """Writes a file of constants.

    Raises:
        ConfigurationError: it cannot be written.
    """
    text = "# Constants of tools/plan.py --constants, fitted to a benchmark.\n"
    try:
        path.write_text(text + yaml.safe_dump(constants.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"--output {path} cannot be written: {error.strerror}; name another file") from None


@dataclass(frozen=True)
class BenchmarkEntry:
    """One model of benchmarks/train_step.py.

    Attributes:
        name: stem of the configuration's file, then overrides, then the version, if several were measured.
        layout: fields of ParallelConfig.
        tokens: of a step.
        step_seconds: median.
    """

    name: str
    layout: dict[str, Any]
    tokens: int
    step_seconds: float

    @property
    def is_of_this_version(self) -> bool:
        """Whether the project as it was then ran it, not one that it was held against."""
        return all("=" in word or word == "now" for word in self.name.split()[1:])


@dataclass(frozen=True)
class Benchmark:
    """What benchmarks/train_step.py has written: limits of the device, and the steps of models."""

    device: str
    dtype: str
    flops_per_second: float
    bytes_per_second: float
    entries: list[BenchmarkEntry]


def read_benchmark(path: Path) -> Benchmark:
    """Reads the JSON of a benchmark.

    Raises:
        ConfigurationError: it is missing, no JSON, or lacks the limits of the device or the steps.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        limits = values["limits"]
        entries = [
            BenchmarkEntry(one["name"], one["layout"], int(one["tokens"]), statistics.median(one["step_seconds"]))
            for one in values["results"]
        ]
        flops, moved = float(limits["flops_per_second"]), float(limits["bytes_per_second"])
        return Benchmark(limits["device"], limits["dtype"], flops, moved, entries)
    except OSError as error:
        reason = error.strerror
    except (KeyError, TypeError) as error:
        reason = f"it lacks or misplaces {error}"
    except ValueError as error:
        reason = f"it is no JSON of that kind: {error}"
    raise ConfigurationError(
        f"--calibrate {path} cannot be read ({reason}); give the train_step.json of benchmarks/train_step.py"
    )


def fit(device: Device, devices_per_node: int, network: Network | None, measured: Sequence[Measured]) -> Device:
    """The device with the constants under which predicted steps are nearest to measured ones (in ratio).

    Constants that no measurement depends on stay as they are.
    """
    for _ in range(ROUNDS):
        for name in FITTED:
            device = _fit_one(device, name, lambda one: _error(one, devices_per_node, network, measured))
    return device


def _fit_one(device: Device, name: str, error: Callable[[Device], float]) -> Device:
    start = getattr(device, name)
    limit = 1.0 if name.endswith("efficiency") else math.inf
    values = [start, *(min(limit, start * factor) for factor in FACTORS)]
    # Of equal ones the first wins, which is the present one.
    return min((device.model_copy(update={name: value}) for value in values), key=error)


def _error(device: Device, devices_per_node: int, network: Network | None, measured: Sequence[Measured]) -> float:
    cluster = Cluster(device, devices_per_node, network)
    ratios = [evaluate(one.work, cluster).time.total / one.step_seconds for one in measured]
    return sum(math.log(ratio) ** 2 for ratio in ratios)
