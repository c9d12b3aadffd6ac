"""What must hold for all tests, before anything else is imported.

GPUs are hidden: the tests compare with CPU numbers and start more processes than a machine has GPUs; tests/gpu gives
them back to the processes it starts. SIGINT is heard: a test run in the background of a shell would ignore it, and so
would every process it starts. Random examples have no time limit: a busy machine is no failure.
"""

import os
import signal
from collections import Counter

import pytest
from hypothesis import settings

# A worker inherits what the process that started it has hidden.
VISIBLE_GPUS = os.environ.get("TESTS_VISIBLE_GPUS" if "PYTEST_XDIST_WORKER" in os.environ else "CUDA_VISIBLE_DEVICES")
if VISIBLE_GPUS is not None:
    os.environ["TESTS_VISIBLE_GPUS"] = VISIBLE_GPUS
os.environ["CUDA_VISIBLE_DEVICES"] = ""
signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("no time limit", deadline=None)
settings.load_profile("no time limit")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Several workers begin with the files that have most slow tests, or one would be left with them at the end."""
    if hasattr(config, "workerinput"):
        marks = ("slow", "whole", "quickstart")
        slow = Counter(item.path for item in items if any(map(item.get_closest_marker, marks)))
        items.sort(key=lambda item: -slow[item.path])
