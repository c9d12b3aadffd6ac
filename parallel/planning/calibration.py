"""Constants from a benchmark on the user's own machine (benchmarks/train_step.py)."""

import math
import shlex
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
)

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
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(values, dict):
            return Constants.model_validate(values)
        reason = "it is empty" if values is None else "it has no fields"
    except OSError as error:
        reason = str(error.strerror)
    except ValidationError as error:
        reason = _first_problem(error)
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
    raise ConfigurationError(f"--constants {path} cannot be read ({reason}); write one with tools/plan.py --calibrate")


def has_constants(path: Path) -> bool:
    """Whether a file holds constants of this or another version."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(values, dict) and "device" in values


def constants_text(constants: Constants) -> str:
    """What a file for --constants holds."""
    values = yaml.safe_dump(constants.model_dump(mode="json"), sort_keys=False)
    return f"# Constants of tools/plan.py --constants, fitted to a benchmark.\n{values}"


@dataclass(frozen=True)
class BenchmarkEntry:
    """One model of benchmarks/train_step.py.

    Attributes:
        name: stem of the configuration's file, then overrides, then the version, if several were measured.
        layout: fields of ParallelConfig.
        tokens: of a step.
        step_seconds: median.
        precision: train.precision; None: older benchmarks did not say.
    """

    name: str
    layout: dict[str, Any]
    tokens: int
    step_seconds: float
    precision: Literal["fp32", "bf16"] | None = None

    @property
    def is_of_this_version(self) -> bool:
        """Whether the project as it was then ran it, not one that it was held against."""
        return all("=" in word or word == "now" for word in shlex.split(self.name)[1:])


@dataclass(frozen=True)
class Benchmark:
    """What benchmarks/train_step.py has written: limits of the device, and the steps of models."""

    device: str
    dtype: str
    flops_per_second: float
    bytes_per_second: float
    entries: list[BenchmarkEntry]

    @property
    def on_cpu(self) -> bool:
        """Whether it ran without a GPU."""
        return self.device.startswith("CPU")

    @property
    def precision(self) -> Literal["fp32", "bf16"]:
        """What train.precision calls the type of the products whose rate the limits have."""
        return "bf16" if self.dtype == "bfloat16" else "fp32"


class _Limits(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)

    device: str
    dtype: Literal["float32", "bfloat16"]
    flops_per_second: PositiveFloat
    bytes_per_second: PositiveFloat


class _Result(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)

    name: str
    layout: dict[str, Any]
    tokens: PositiveInt
    step_seconds: list[PositiveFloat] = Field(min_length=1)
    precision: Literal["fp32", "bf16"] | None = None

    @field_validator("name")
    @classmethod
    def _names_something(cls, name: str) -> str:
        if not shlex.split(name):
            raise ValueError("no configuration is named")
        return name


class _Record(BaseModel):
    """The JSON of benchmarks/train_step.py, as far as it is needed here."""

    limits: _Limits
    results: list[_Result]


def read_benchmark(path: Path) -> Benchmark:
    """Reads the JSON of a benchmark.

    Raises:
        ConfigurationError: it is missing, no JSON, or lacks the limits of the device or the steps.
    """
    try:
        record = _Record.model_validate_json(path.read_bytes())
    except OSError as error:
        reason = str(error.strerror)
    except ValidationError as error:
        reason = _first_problem(error)
    else:
        entries = [
            BenchmarkEntry(one.name, one.layout, one.tokens, statistics.median(one.step_seconds), one.precision)
            for one in record.results
        ]
        return Benchmark(**record.limits.model_dump(), entries=entries)
    raise ConfigurationError(
        f"--calibrate {path} cannot be read ({reason}); give the train_step.json of benchmarks/train_step.py"
    )


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    return ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))


def fit(
    device: Device,
    devices_per_node: int,
    network: Network | None,
    measured: Sequence[Measured],
    names: Sequence[str] = FITTED,
) -> Device:
    """The device with the constants of these names under which predicted steps are nearest to measured ones (in ratio).

    Constants that no measurement depends on stay as they are.
    """
    for _ in range(ROUNDS):
        for name in names:
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
