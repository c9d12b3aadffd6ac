"""What the console and TensorBoard say of a process."""

import subprocess
import sys

import torch

from train.config import REPOSITORY

GIB = 2**30
PROGRAM = "from train.monitor import peak_memory_bytes; print(peak_memory_bytes())"


def test_the_peak_of_the_process_that_started_this_one_is_not_its_own() -> None:
    ballast = torch.ones(GIB, dtype=torch.uint8)  # filled, so resident
    del ballast
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=300
    )
    assert GIB / 10 < int(found.stdout) < GIB  # of what it imports
