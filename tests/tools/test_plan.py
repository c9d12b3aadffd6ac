"""tools/plan.py as a user starts it: tables, YAML, choices between models, calibration, and mistakes in one line."""

import json
import re
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from parallel.planning.calibration import Benchmark, BenchmarkEntry, read_constants
from parallel.planning.hardware import DEVICES
from tests.tools.outcomes import Script
from tools.plan import measured_workload
from train.config_file import load_config

ROOT = Path(__file__).resolve().parents[2]
PAPER = ROOT / "configs" / "paper"
LARGE, SMALL = PAPER / "block_main_b4_1.2b.yaml", PAPER / "block_main_b4_5.yaml"


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Script:
    return Script(ROOT / "tools" / "plan.py", monkeypatch, capsys)


def test_a_plan_is_a_configuration_that_can_run(plan: Script) -> None:
    outcome = plan(LARGE, "--gpus", 8, "--gpu", "a100-40g", "--explain", "--top", 2)
    assert outcome.status == 0
    assert outcome.output.count("\n| ") == 3  # the header and two layouts
    assert "activations" in outcome.output
    snippet = yaml.safe_load(outcome.output[outcome.output.index("parallel:") :])
    overrides = [f"{section}.{name}={value}" for section, fields in snippet.items() for name, value in fields.items()]
    config = load_config(LARGE, overrides)
    assert config.parallel.world_size == 8


def test_a_runs_own_layout_does_not_matter(plan: Script, tmp_path: Path) -> None:
    own = tmp_path / "block_main_b4_5.yaml"
    layout = {"tensor": 7, "activation_checkpointing": "budget", "activation_memory_gib": 1e-3}
    own.write_text(yaml.safe_dump({"base": str(SMALL), "parallel": layout, "train": {"micro_batch_size": 7}}))
    other, usual = plan(own, "--gpus", 2), plan(SMALL, "--gpus", 2)
    assert (other.status, usual.status) == (0, 0), other.errors + usual.errors
    assert other.output == usual.output


def test_layouts_as_json_are_best_first(plan: Script) -> None:
    found = json.loads(plan(SMALL, "--gpus", 2, "--json", "--top", 5, "--tokens", 1e9).output)
    hours = [one["hours"] for one in found]
    assert hours == sorted(hours)
    best = found[0]
    assert best["gpu_hours"] == pytest.approx(2 * best["hours"])
    assert best["hours"] == pytest.approx(1e9 / best["tokens_per_second"] / 3600)
    assert best["memory_bytes"]["total"] == pytest.approx(sum(best["memory_bytes"].values()) / 2)


def test_which_model_for_two_budgets(plan: Script) -> None:
    models = [PAPER / f"{name}.yaml" for name in ("block_main_b4_5", "block_main_b4_85", "vanilla_70")]
    budgets = ("--train-budget", "2.5e20FLOP", "--inference-budget", "2e9FLOP")
    outcome = plan(*models, "--gpus", 1, *budgets)
    assert outcome.output.endswith("lowest loss within the budgets: block_main_b4_85\n")
    poorer = plan(*models, "--gpus", 1, "--train-budget", "1.2e20FLOP", "--losses", "block_main_b4_5=2.1")
    assert poorer.output.endswith("lowest loss within the budgets: block_main_b4_5\n")
    assert "not training" in poorer.output


def test_a_model_that_no_layout_trains_is_not_the_answer(plan: Script) -> None:
    large = PAPER / "block_main_b4_6.9b.yaml"
    place = ("--gpus", 1, "--gpu", "a100-40g", "--losses", "block_main_b4_6.9b=1.0")
    for budget in (("--train-budget", "1e24FLOP"), ("--inference-budget", "1e15FLOP")):
        outcome = plan(large, SMALL, *place, *budget)
        assert outcome.output.endswith("lowest loss within the budgets: block_main_b4_5\n")
        (row,) = [line for line in outcome.output.splitlines() if line.startswith("| block_main_b4_6.9b |")]
        assert "| no layout fits |  |" in row
        assert row.endswith("| not training |")


def test_calibration(plan: Script, tmp_path: Path) -> None:
    record: dict[str, Any] = {
        "limits": {"device": "CPU", "dtype": "float32", "flops_per_second": 1e11, "bytes_per_second": 2e10},
        "results": [
            {"name": f"block_main_b4_5 {name}", "layout": layout, "tokens": tokens, "step_seconds": [2.0, 2.1, 2.2]}
            for name, layout, tokens in (
                ("train.micro_batch_size=2 now", {"zero_stage": 1}, 2 * 2048),
                ("train.micro_batch_size=2 abc1234", {"zero_stage": 1}, 2 * 2048),
                ("model.sequence_length=8192 now", {"zero_stage": 1}, 8192),
                ("parallel.data=2 now", {"data": 2}, 2 * 2048),
            )
        ],
    }
    (tmp_path / "train_step.json").write_text(json.dumps(record))
    constants = tmp_path / "constants.yaml"
    outcome = plan("--calibrate", tmp_path / "train_step.json", "--gpu", "cpu", "--output", constants)
    assert outcome.status == 0, outcome.errors
    assert "fitted cpu to 2 of 4 measured steps" in outcome.output
    found = json.loads(plan(SMALL, "--gpus", 1, "--constants", constants, "--json").output)
    assert found
    rates = read_constants(constants).device.flops_per_second
    assert rates == DEVICES["cpu"].flops_per_second | {"fp32": 1e11}
    outcome = plan("--calibrate", tmp_path / "train_step.json", "--gpu", "h100-80g", "--output", constants)
    assert "--gpu h100-80g is not what" in outcome.errors[-1]
    assert "which is CPU; use --gpu cpu" in outcome.errors[-1]
    record["results"] = record["results"][3:]
    (tmp_path / "train_step.json").write_text(json.dumps(record))
    outcome = plan("--calibrate", tmp_path / "train_step.json", "--gpu", "cpu", "--output", constants)
    assert "has no step to fit to" in outcome.errors[-1]
    assert "in fp32 with one process" in outcome.errors[-1]


def write_benchmark(path: Path, device: str) -> Path:
    limits = {"device": device, "dtype": "bfloat16", "flops_per_second": 3e14, "bytes_per_second": 2e12}
    result = {"name": "block_main_b4_5", "layout": {}, "tokens": 2048, "step_seconds": [0.1], "precision": "bf16"}
    path.write_text(json.dumps({"limits": limits, "results": [result]}))
    return path


@pytest.mark.parametrize(
    ("device", "gpu", "possible"),
    [
        ("NVIDIA A100-SXM4-80GB", "h100-80g", "a100-80g"),
        ("NVIDIA A100-SXM4-80GB", "a100-40g", "a100-80g"),
        ("NVIDIA A100-SXM4-80GB", "a100-80g", None),
        ("NVIDIA A100-SXM-64GB", "a100-80g", None),
        ("NVIDIA A100-SXM-64GB", "h200-141g", "a100-40g or a100-80g"),
        ("NVIDIA H100 80GB HBM3", "h200-141g", "h100-80g"),
        ("NVIDIA H100 80GB HBM3", "h100-80g", None),
        ("NVIDIA H200", "h100-80g", "h200-141g"),
        ("NVIDIA H200", "h200-141g", None),
        ("NVIDIA GH200 480GB", "h100-80g", None),
    ],
)
def test_a_gpu_is_calibrated_with_its_own_benchmark(
    plan: Script, tmp_path: Path, device: str, gpu: str, possible: str | None
) -> None:
    benchmark = write_benchmark(tmp_path / "train_step.json", device)
    outcome = plan("--calibrate", benchmark, "--gpu", gpu, "--output", tmp_path / "constants.yaml")
    if possible is None:
        assert outcome.status == 0, outcome.errors
        assert read_constants(tmp_path / "constants.yaml").device.name == gpu
    else:
        assert outcome.status == 2
        assert f"which is {device}; use --gpu {possible}, or" in outcome.errors[-1]
        assert not (tmp_path / "constants.yaml").exists()


def test_calibration_overwrites_constants_alone(plan: Script, tmp_path: Path) -> None:
    benchmark = write_benchmark(tmp_path / "train_step.json", "NVIDIA H100 80GB HBM3")
    config, constants = tmp_path / "run.yaml", tmp_path / "constants.yaml"
    config.write_bytes(SMALL.read_bytes())
    for path in (benchmark, config):
        before = path.read_bytes()
        outcome = plan("--calibrate", benchmark, "--output", path)
        assert outcome.status == 2
        assert f"--output {path} is there and is no file of constants" in outcome.errors[-1]
        assert path.read_bytes() == before
    for path in (tmp_path, benchmark / "constants.yaml", tmp_path / "none" / "constants.yaml"):
        outcome = plan("--calibrate", tmp_path / "none.json", "--output", path)  # said before anything is read
        assert outcome.status == 2
        assert f"{path} cannot be written" in outcome.errors[-1]
    for _ in range(2):
        assert plan("--calibrate", benchmark, "--output", constants).status == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["constants.yaml", "run.yaml", "train_step.json"]


def test_a_measured_step_is_of_the_measured_device_and_in_its_own_precision() -> None:
    paths = {"block_main_b4_5": SMALL}

    def work(device: str, precision: Literal["fp32", "bf16"] | None) -> tuple[bool, str]:
        entry = BenchmarkEntry("block_main_b4_5", {}, 2048, 1.0, precision)
        found = measured_workload(entry, Benchmark(device, "bfloat16", 1e14, 1e12, [entry]), paths)
        return found.on_gpu, found.precision

    assert work("NVIDIA H200", "fp32") == (True, "fp32")
    assert work("NVIDIA H200", None) == (True, load_config(SMALL).train.precision)
    assert work("CPU, 2 threads", "bf16") == (False, "bf16")
    assert work("CPU, 2 threads", None) == (False, "fp32")


def test_a_measured_step_has_the_batch_that_it_ran_with() -> None:
    entry = BenchmarkEntry("block_main_b4_5 model.sequence_length=8192", {}, tokens=3 * 8192, step_seconds=1.0)
    paths = {"block_main_b4_5": ROOT / "configs" / "paper" / "block_main_b4_5.yaml"}
    work = measured_workload(entry, Benchmark("CPU", "float32", 1e11, 1e10, [entry]), paths)
    assert (work.micro_batch_size, work.num_micro_batches, work.model.sequence_length) == (1, 3, 8192)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no CONFIG is given"),
        ((SMALL,), "--gpus is missing"),
        (
            (PAPER / "block_main_b4_6.9b.yaml", "--gpus", 1, "--gpu", "a100-40g"),
            "no layout of 1 x a100-40g fits: .* of",
        ),
        ((SMALL, "--gpus", 16, "--network", "nvlink-only"), "--network=nvlink-only has no way between nodes"),
        (
            (SMALL, "--gpus", 1, "--train-budget", "5"),
            "--train-budget=5 is not a positive finite number with one of the units FLOP, h",
        ),
        ((SMALL, "--gpus", 1, "--train-budget", "1.2.3h"), "--train-budget=1.2.3h is not a positive finite number"),
        ((SMALL, "--gpus", 1, "--train-budget", ".h"), "--train-budget=.h is not a positive finite number"),
        ((SMALL, "--gpus", 1, "--train-budget", "1e999h"), "--train-budget=1e999h is not a positive finite number"),
        ((SMALL, "--gpus", 1, "--train-budget", "0h"), "--train-budget=0h is not a positive finite number"),
        ((SMALL, "--gpus", 1, "--losses", "x"), "--losses x is not NAME=LOSS"),
        ((SMALL, "--gpus", 1, "--losses", "x=2"), "--losses x=2: no model is called x; there are block_main_b4_5"),
        ((SMALL, SMALL, "--gpus", 1), "two of .* have the same name"),
        ((SMALL, "--gpus", 1, "--constants", "none.yaml"), "--constants none.yaml cannot be read"),
        (("--calibrate", "none.json"), "--calibrate needs --output"),
        ((SMALL, "--gpus", 1, "--tokens", 0), "--tokens=0 is not positive"),
        ((SMALL, "--gpus", 1, "--tokens", "inf"), "--tokens=inf is not positive and finite"),
        ((SMALL, "--gpus", 1, "--losses", "block_main_b4_5=nan"), "--losses block_main_b4_5=nan is not NAME=LOSS"),
        ((SMALL, "--gpus", 1, "--setting", "2048/1"), "--setting=2048/1 is not PROMPT/NEW"),
    ],
)
def test_mistakes(plan: Script, arguments: tuple[object, ...], message: str) -> None:
    outcome = plan(*arguments)
    assert outcome.status == 2
    (line,) = [line for line in outcome.errors if line.startswith("error: ")]
    assert re.search(message, line), line
