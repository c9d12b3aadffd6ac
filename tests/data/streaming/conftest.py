from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data.streaming.faulty_server import FaultyServer, serving


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FaultyServer]:
    folder = tmp_path / "served"
    folder.mkdir()
    with serving(folder) as running:
        yield running
