"""Constants are found again from step times that were computed with them; files that are no benchmark are refused."""

import json
from pathlib import Path

import pytest

from parallel.config import ParallelConfig
from parallel.errors import ConfigurationError
from parallel.planning.calibration import Constants, Measured, fit, read_benchmark, read_constants, write_constants
from parallel.planning.communication import Cluster
from parallel.planning.hardware import DEVICES
from parallel.planning.search import evaluate
from parallel.planning.workload import Workload
from train.selftest_models import MODELS


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
    write_constants(tmp_path / "constants.yaml", Constants(device=found))
    assert read_constants(tmp_path / "constants.yaml").device == found
    for one in measured:
        assert evaluate(one.work, Cluster(found, 8, None)).time.total == pytest.approx(one.step_seconds, rel=0.1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON of that kind"),
        ("{}", "lacks or misplaces 'limits'"),
        (json.dumps({"limits": {"flops_per_second": 1, "bytes_per_second": 1, "dtype": "float32"}}), "'results'"),
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
