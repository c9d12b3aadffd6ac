"""Counts what processes send each other."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Collectives(TorchDispatchMode):
    """Counts the collectives that are called inside of it.

    Attributes:
        reductions: all-reduces.
        others: gathers and scatters, and anything else.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reductions = self.others = 0

    def __torch_dispatch__(self, operation: Any, _types: Any, arguments: Any = (), options: Any = None) -> Any:
        if operation.namespace == "c10d":
            if "allreduce" in operation.__name__:
                self.reductions += 1
            else:
                self.others += 1
        return operation(*arguments, **(options or {}))
