"""Constants are found again from step times that were computed with them; files that are no benchmark are refused."""

import json
from pathlib import Path

import pytest

from parallel.config import ParallelConfig
from parallel.errors import ConfigurationError
from parallel.planning.calibration import Constants, Measured, constants_text, fit, read_benchmark, read_constants
from parallel.planning.communication import Cluster
from parallel.planning.hardware import DEVICES
from parallel.planning.search import evaluate
from parallel.planning.workload import Workload
from train.selftest_models import MODELS

LIMITS = {"device": "CPU", "dtype": "float32", "flops_per_second": 1e11, "bytes_per_second": 1e10}
RESULT = {"name": "block_main_b4_5", "layout": {}, "tokens": 2048, "step_seconds": [1.0]}


def test_constants_are_found_again(tmp_path: Path) -> None:
    start = DEVICES["cpu"]
    true = start.model_copy(update={"product_efficiency": 0.5, "memory_efficiency": 0.3})
    works = [
        Workload(MODELS[name], ParallelConfig(), size, 2, "fp32", on_gpu=False)
        for name in ("block", "vanilla", "Llama")
        for size in (1, 4)
    ]
    measured = [Measured(work, evaluate(work, Cluster(true, 8, None)).time.total) for work in works]
    found = fit(start, 8, None, measured)
    (tmp_path / "constants.yaml").write_text(constants_text(Constants(device=found)))
    assert read_constants(tmp_path / "constants.yaml").device == found
    for one in measured:
        assert evaluate(one.work, Cluster(found, 8, None)).time.total == pytest.approx(one.step_seconds, rel=0.1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Invalid JSON"),
        ("{}", "limits: Field required"),
        (json.dumps({"limits": LIMITS}), "results: Field required"),
        (json.dumps({"limits": LIMITS | {"bytes_per_second": 0}, "results": []}), "limits.bytes_per_second: .* than 0"),
        (json.dumps({"limits": LIMITS | {"device": 5}, "results": []}), "limits.device"),
        (json.dumps({"limits": LIMITS, "results": [RESULT | {"name": ""}]}), "results.0.name: .*no configuration"),
        (
            json.dumps({"limits": LIMITS, "results": [RESULT | {"name": 'a run.name="b'}]}),
            "results.0.name: .*quotation",
        ),
        (json.dumps({"limits": LIMITS, "results": [RESULT | {"layout": []}]}), "results.0.layout"),
        (json.dumps({"limits": LIMITS, "results": [RESULT | {"step_seconds": [0.0]}]}), "step_seconds.0: .* than 0"),
    ],
)
def test_files_that_are_no_benchmark(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "train_step.json"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        read_benchmark(path)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="No such file"):
        read_benchmark(tmp_path / "none.json")
    with pytest.raises(ConfigurationError, match=r"No such file.*--calibrate"):
        read_constants(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"flops_per_second": {"fp32": 1e12}}, "device.flops_per_second: .* at least 2 items"),
        ({"flops_per_second": {"fp32": 1e12, "bf16": 0.0}}, "device.flops_per_second.bf16: .* greater than 0"),
        ({"flops_per_second": {"fp32": 1e12, "bf16": -5.0}}, "device.flops_per_second.bf16: .* greater than 0"),
        ({"reserved_gib": 200.0}, "device: .*reserved_gib=200"),
        ({"speed": 1.0}, "device.speed: Extra inputs"),
    ],
)
def test_constants_that_no_device_has(tmp_path: Path, wrong: dict[str, object], message: str) -> None:
    values = {"device": DEVICES["h100-80g"].model_dump(mode="json") | wrong}
    (tmp_path / "constants.yaml").write_text(json.dumps(values))
    with pytest.raises(ConfigurationError, match=rf"cannot be read \({message}"):
        read_constants(tmp_path / "constants.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is empty"),
        ("- device", "it has no fields"),
        ("{}", "device: Field required"),
        ("device: {", "while parsing a flow"),
        ("device: 2020-13-45", "month must be in"),
    ],
)
def test_files_that_are_no_constants(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "constants.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=rf"^--constants {path} cannot be read \({message}[^\n]*--calibrate$"):
        read_constants(path)
