"""Nothing here may use the network."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.evaluation.harness.local_files import train_tokenizer, write_local_files


def refuse(*arguments: object) -> None:
    raise AssertionError(f"a test reached for the network: {arguments[1:]}")


@pytest.fixture(scope="package", autouse=True)
def offline() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex", "sendto"):
            patch.setattr(socket.socket, name, refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        yield


@pytest.fixture(scope="package")
def task_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_local_files(tmp_path_factory.mktemp("task_data"))


@pytest.fixture(scope="package")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")
