"""Copies of a rank's weights and moments in main memory, so that they can be written while training goes on."""

from collections.abc import Iterable

import torch
from torch import Tensor

from checkpoints.records import Fragment


class HostCopies:
    """Memory that is kept from one save to the next: taking it anew costs more than the copy itself.

    On GPU it is page-locked, so that all copies are under way at once.
    """

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def copy(self, fragments: Iterable[tuple[Fragment, Tensor]]) -> list[tuple[Fragment, Tensor]]:
        """Copies what training will change; the copies before are overwritten.

        Args:
            fragments: each with its values, fp32 of shape [flat_stop - flat_start].

        Returns:
            The same fragments with values in main memory.
        """
        copies = [(fragment, self._copied(fragment.key, values.detach())) for fragment, values in fragments]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies

    def _copied(self, key: str, values: Tensor) -> Tensor:
        memory = self._memory.get(key)
        if memory is None or memory.shape != values.shape:
            memory = torch.empty_like(values, device="cpu", pin_memory=values.is_cuda)
            self._memory[key] = memory
        return memory.copy_(values, non_blocking=True)
