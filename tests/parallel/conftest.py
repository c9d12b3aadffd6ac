"""One process, one process group: what most model tests need."""

from collections.abc import Iterator

import pytest
import torch.distributed

from parallel.config import ParallelConfig
from parallel.topology import initialize_topology


@pytest.fixture(scope="session", autouse=True)
def single_process() -> Iterator[None]:
    """A process group of one, with the topology laid over it."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    initialize_topology(ParallelConfig())
    yield
    torch.distributed.destroy_process_group()
