"""Skips tests marked `gpu` where there is none, and runs programs with and without one."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import VISIBLE_GPUS

ROOT = Path(__file__).resolve().parents[2]
Program = Callable[..., str]
# Torch answers whether there is a GPU differently before and after it was hidden, so a new process is asked.
QUESTION = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
TIMEOUT_SECONDS = 900


def run_python(*arguments: object, gpu: bool) -> str:
    """Runs Python in the repository and returns what it printed; fails with its output if it fails."""
    hidden = ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR")  # DeepSpeed's choice of device for the tests' own process
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    if not gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    elif VISIBLE_GPUS is not None:
        environment["CUDA_VISIBLE_DEVICES"] = VISIBLE_GPUS
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="session")
def gpu_name() -> str:
    """Name of this machine's GPU; empty without one."""
    return run_python("-c", QUESTION, gpu=True).strip()


@pytest.fixture(autouse=True)
def _skip_without_gpu(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and not request.getfixturevalue("gpu_name"):
        pytest.skip("torch finds no CUDA device on this machine")
