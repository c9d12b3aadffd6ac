"""Speed and MFU arithmetic."""

import pytest
import torch

from parallel.costs import forward_flops_per_token
from train.selftest_models import MODELS
from train.throughput import SpeedMeter, device_peak_tflops


def test_speed_is_tokens_and_flops_over_the_time_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0, 11.0, 12.0, 100.0, 100.5, 102.0])
    monkeypatch.setattr("train.throughput.time.perf_counter", lambda: next(clock))
    meter = SpeedMeter(MODELS["block"], world_size=4)
    for _ in range(2):  # 2 s each; the pause from 12 to 100 does not count
        meter.start_step()
        meter.data_ready()
        meter.end_step(tokens=1000)
    assert meter.data_wait == pytest.approx(1.5)
    speed = meter.read()
    assert speed.tokens_per_second == pytest.approx(500)
    assert speed.tflops_per_process == pytest.approx(500 * 3 * forward_flops_per_token(MODELS["block"]) / 4 / 1e12)
    assert meter.read().tokens_per_second == 0.0


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-40GB", 312.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA GH200 480GB", 989.0),
        ("NVIDIA RTX A1000 Laptop GPU", None),
        ("Some Future GPU", None),
    ],
)
def test_peak_is_known_by_name_or_not_at_all(monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert device_peak_tflops() == peak
