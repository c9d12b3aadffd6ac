"""What the console and TensorBoard say of a process."""

import subprocess
import sys

from train.config import REPOSITORY

GIB = 2**30
PROGRAM = "from train.monitor import peak_memory_bytes; print(peak_memory_bytes())"
# The other one is not this process, whose own peak would be there in the tests that follow.
OTHER = f"""
import subprocess, sys
ballast = bytearray(b"x") * {GIB}  # filled, so resident
del ballast
sys.exit(subprocess.run([sys.executable, "-c", {PROGRAM!r}]).returncode)
"""


def test_the_peak_of_the_process_that_started_this_one_is_not_its_own() -> None:
    found = subprocess.run(
        [sys.executable, "-c", OTHER], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=300
    )
    assert GIB / 10 < int(found.stdout) < GIB  # of what it imports
