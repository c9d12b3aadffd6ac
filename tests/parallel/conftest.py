"""All tests here run the model in one process."""

import pytest
import torch

from parallel import products
from tests.single_process import single_process

__all__ = ["single_process"]


@pytest.fixture(params=["GenuineIntel", "AuthenticAMD"])
def vendor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who made the processor, as far as the choice of a library for products is concerned."""
    name: str = request.param
    monkeypatch.setattr(products, "processor_entry", lambda *_: name)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    return name
