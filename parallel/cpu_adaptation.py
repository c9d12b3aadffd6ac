"""Lets Megatron-core run on CPU with gloo; inert where CUDA exists.

Written for megatron-core 0.16.1, whose pipeline schedule creates tensors with `device="cuda"` and whose tensor-parallel
mappings and point-to-point transfers ask `torch.cuda.current_device()`. tests/parallel/test_cpu_adaptation.py fails as
soon as that is no longer so, and then this module can go.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _CudaMeansCpu(TorchFunctionMode):
    """Turns `device="cuda"` of tensor factories into the CPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = torch.device("cpu")
        return func(*args, **kwargs)


def compute_device() -> torch.device:
    """The device this process computes on."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def adapt_megatron_to_cpu() -> None:
    """Answers Megatron-core's questions about the current CUDA device with the CPU; does nothing with CUDA."""
    if torch.cuda.is_available():
        return
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]


@contextlib.contextmanager
def cpu_schedule() -> Iterator[None]:
    """Context in which Megatron-core's pipeline schedule allocates on the CPU; does nothing with CUDA."""
    if torch.cuda.is_available():
        yield
        return
    with _CudaMeansCpu():
        yield
