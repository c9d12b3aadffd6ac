"""A process of the benchmark of training steps: what it counts as the model's memory."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.train_step import WORKER
from tests.benchmarks.test_train_step import write_config
from tests.processes import run_processes
from train.config import REPOSITORY
from train.config_file import load_config

YARDSTICK = 6144  # rows and columns; a matrix has many times what so small a model takes, libraries included
MATRIX = 4 * YARDSTICK**2


def measured(path: Path) -> tuple[int, dict[str, float]]:
    """What there was before the model, and the answer after a step."""
    sys.argv = [str(WORKER), str(REPOSITORY)]
    specification = importlib.util.spec_from_file_location("train_step_worker", WORKER)
    assert specification is not None
    assert specification.loader is not None
    worker: Any = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(worker)
    worker.YARDSTICK = YARDSTICK
    overrides = ["parallel.data=1", "train.precision=fp32", "train.micro_batch_size=2", "train.global_batch_size=2"]
    subject = worker.Subject(load_config(path, overrides))
    return subject.memory.before, subject.step()


@pytest.mark.slow
def test_the_yardstick_is_no_memory_of_the_model(tmp_path: Path) -> None:
    ((before, answer),) = run_processes(1, measured, write_config(tmp_path))
    assert before > 2 * MATRIX
    assert 0 < answer["peak_bytes"] - before < MATRIX
