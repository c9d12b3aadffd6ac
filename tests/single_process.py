"""One process, one process group: what most model tests need; conftest files import it."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed

from parallel.topology import start_single_process


@pytest.fixture(scope="package", autouse=True)
def single_process() -> Iterator[None]:
    """A process group of one, with the topology laid over it."""
    torch.set_num_threads(1)  # small tensors: more threads only wait for each other
    start_single_process()
    yield
    torch.distributed.destroy_process_group()
