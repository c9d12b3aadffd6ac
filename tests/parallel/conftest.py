"""All tests here run the model in one process."""

import pytest
import torch

from parallel import products
from tests.single_process import single_process

__all__ = ["single_process"]


@pytest.fixture(params=["MKL", "oneDNN"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The library for fp32 products on CPU, chosen by the processor's vendor."""
    name: str = request.param
    present_processor(monkeypatch, "GenuineIntel" if name == "MKL" else "AuthenticAMD", "AVX512")
    return name


def present_processor(monkeypatch: pytest.MonkeyPatch, vendor: str, capability: str) -> None:
    """What the choice of a library for products sees; MKL is there."""
    monkeypatch.setattr(products, "processor_entry", {"vendor_id": vendor}.__getitem__)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
