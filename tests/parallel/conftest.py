"""All tests here run the model in one process."""

import pytest
import torch

from parallel import products
from tests.single_process import single_process

__all__ = ["single_process"]


@pytest.fixture(params=["MKL", "oneDNN"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The library for fp32 products on CPU, chosen by what the processor says of itself."""
    name: str = request.param
    entries = {"vendor_id": "GenuineIntel" if name == "MKL" else "AuthenticAMD", "flags": "avx2 avx512f"}
    monkeypatch.setattr(products, "processor_entry", entries.__getitem__)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    return name
