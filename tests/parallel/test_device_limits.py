"""The yardsticks, measured for real."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from parallel import device_limits
from parallel.device_limits import measure_device_limits

CPU = torch.device("cpu")


class Products(TorchDispatchMode):
    """Notes the rows of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(self, operation: Any, _types: Any, arguments: Any = (), options: Any = None) -> Any:
        if operation is torch.ops.aten.mm.out:
            self.rows.append(len(arguments[0]))
        return operation(*arguments, **(options or {}))


def test_limits() -> None:
    limits = measure_device_limits(CPU, torch.float32)
    assert limits.dtype == "float32"
    assert 1e9 < limits.flops_per_second < 1e14
    assert 1e8 < limits.bytes_per_second < 1e13


def test_slow_products_are_measured_with_small_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """As bf16 is on a CPU without instructions for it, where 4,096 rows take minutes; integers are slow anywhere."""
    monkeypatch.setattr(device_limits, "SECONDS_OF_PRODUCT", 0.2)
    with Products() as products:
        limits = measure_device_limits(CPU, torch.int32)
    assert max(products.rows) < 4096
    assert limits.flops_per_second > 1e7
