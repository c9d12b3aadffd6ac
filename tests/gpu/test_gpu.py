"""A GPU against the CPU, and the 1.2B model on a GPU; what needs none of it runs on the CPU with a tiny model."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from tests.gpu.conftest import run_python

PAPER_CONFIG = "configs/paper/block_main_b4_1.2b.yaml"
STEPS = 20
# Largest relative difference of loss and gradient norm, and of gradient elements by the tensor's largest one. fp32 sums
# in another order, over 4096 tokens and 12 layers; bf16 has 8 bits of mantissa.
TOLERANCES = {"fp32": (1e-4, 1e-3), "bf16": (5e-3, 1e-1)}


def probe(size: str, output: Path, gpu: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    run_python("-m", "tests.gpu.probe", size, output, gpu=gpu)
    with safe_open(output, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118 (not a dict)


def differences(expected: dict[str, Tensor], actual: dict[str, Tensor]) -> list[str]:
    """What differs by more than its tolerance."""
    assert expected.keys() == actual.keys()
    found = [] if torch.equal(expected["generated"], actual["generated"]) else ["generated"]
    for precision, (scalar, tensor) in TOLERANCES.items():
        gradients = {name: value for name, value in expected.items() if name.startswith(f"{precision}/gradient/")}
        # Key biases outside the rotary dimensions have no gradient but rounding.
        floor = 1e-6 * max(float(value.abs().max()) for value in gradients.values())
        for name in (f"{precision}/loss", f"{precision}/norm", *gradients):
            allowed = tensor if name in gradients else scalar
            largest = max(float(expected[name].abs().max()), floor)
            difference = float((actual[name] - expected[name]).abs().max()) / largest
            if not difference <= allowed:
                found.append(f"{name}: {difference:.1e}")
    return found


def train_paper_model(*overrides: str, gpu: bool) -> dict[str, object]:
    alone = ["parallel.data=1", "train.global_batch_size=16"]
    output = run_python("-m", "tests.gpu.training_speed", STEPS, PAPER_CONFIG, *alone, *overrides, gpu=gpu)
    report: dict[str, object] = json.loads(output.splitlines()[-1])
    losses = report.pop("losses")
    assert isinstance(losses, list)
    assert len(losses) == STEPS
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]
    return report


@pytest.mark.slow
def test_probe_and_comparison_on_cpu(tmp_path: Path) -> None:
    values, metadata = probe("tiny", tmp_path / "cpu.safetensors", gpu=False)
    assert metadata == {"device": "cpu", "backend": "gloo"}
    assert differences(values, values) == []
    for name in ("generated", "fp32/loss", "bf16/norm", "bf16/gradient/token_decoder.output.head.weight"):
        changed = {**values, name: values[name] + (1 if name == "generated" else values[name].abs().max())}
        assert [line.partition(":")[0] for line in differences(values, changed)] == [name]


@pytest.mark.slow
def test_speed_measurement_on_cpu() -> None:
    stack = "{num_layers: 1, hidden_size: 32, num_attention_heads: 4}"
    shrunken = [f"model.{part}={stack}" for part in ("block_decoder", "token_decoder")]
    report = train_paper_model(*shrunken, "model.vocab_size=96", "model.sequence_length=64", gpu=False)
    assert report["device"] == "cpu"
    assert report["mfu"] is None
    assert min(report[name] for name in ("tokens_per_second", "tflops", "peak_memory_gib")) > 0  # type: ignore[type-var]


@pytest.mark.gpu
def test_block_85m_equals_the_cpu(tmp_path: Path) -> None:
    expected, _ = probe("85m", tmp_path / "cpu.safetensors", gpu=False)
    actual, metadata = probe("85m", tmp_path / "gpu.safetensors", gpu=True)
    assert metadata == {"device": "cuda:0", "backend": "nccl"}
    assert differences(expected, actual) == []


@pytest.mark.gpu
def test_every_zero_stage_of_one_process() -> None:
    """Against the unsharded model on the same GPU; in fp32, 1 and 2 would train as 0 does."""
    output = run_python("tools/selftest.py", gpu=True)
    assert "FAIL" not in output
    for stages in ("0", "3", "1, bf16", "2, bf16", "3, bf16"):
        assert f"PASS  one process, ZeRO {stages}" in output.splitlines()


@pytest.mark.gpu
def test_20_steps_of_the_paper_model(gpu_name: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = train_paper_model(gpu=True)
    assert report["device"] == gpu_name
    with capsys.disabled():
        print(f"\n{PAPER_CONFIG}, micro-batch 16, {STEPS} steps: {json.dumps(report)}")
