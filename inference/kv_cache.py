"""Keys and values of past positions, in memory taken once."""

import math

import torch
from torch import Tensor

from inference.memory import check_room_for_cache


class KeyValueCache:
    """Keys and values of one stack of layers: 2 x layers x key and value heads x head size x capacity per sequence.

    That is 2 n D T values for a vanilla model, 2 n D T / L for a block decoder, 2 n D (P + L - 1) for a token decoder
    (paper section 2.4).

    A CUDA graph cannot follow a number that Python counts: from `fix` on, one position at a time is stored where a
    tensor says.

    Attributes:
        memory: [layers, 2, sequences, groups, capacity, head size].
        length: positions held so far.
        capacity: positions there is room for.
        position: int64 [1], where the next position is stored; None outside of graphs.
        span: positions that attention goes over in a graph; those beyond `position` need a mask.
    """

    def __init__(
        self,
        num_layers: int,
        groups: int,
        head_size: int,
        num_sequences: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_layers, 2, num_sequences, groups, capacity, head_size)
        self.length = 0
        self.capacity = capacity
        self.position: Tensor | None = None
        self.span = 0
        check_room_for_cache(math.prod(shape) * dtype.itemsize, num_sequences, capacity, device)
        self.memory = torch.empty(shape, dtype=dtype, device=device)
        self._layers = self.memory.unbind(0)

    def append(self, layer: int, keys_and_values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores new positions of a layer behind those that all layers hold.

        Args:
            layer: number of the layer.
            keys_and_values: [2, B, groups, new positions, head size].

        Returns:
            Keys and values of all positions, [B, groups, length + new positions, head size]; in a graph, of `span`.
        """
        count = keys_and_values.shape[3]
        memory = self._layers[layer]
        if self.position is not None:
            memory.index_copy_(3, self.position, keys_and_values)
            keys, values = memory.narrow(3, 0, self.span).unbind(0)
            return keys, values
        memory.narrow(3, self.length, count).copy_(keys_and_values)
        keys, values = memory.narrow(3, 0, self.length + count).unbind(0)
        return keys, values

    def advance(self, positions: int) -> None:
        """Counts positions that all layers have stored."""
        self.length += positions
        if self.position is not None:
            self.position.add_(positions)

    def fix(self, span: int) -> None:
        """Starts to store by a tensor, at the present length; what is behind is cleared, so that masks can hide it."""
        self.span = span
        if self.position is None:
            self.position = torch.tensor([self.length], device=self.memory.device)
            self.memory.narrow(4, self.length, self.capacity - self.length).zero_()

    def reset(self) -> None:
        """Forgets all positions; the memory stays."""
        self.length = 0

    def release(self) -> None:
        """Gives the memory back; nothing can be stored afterwards."""
        self.memory = self.memory.new_empty(0)
        self._layers = ()

    @property
    def bytes(self) -> int:
        """Memory taken."""
        return self.memory.nbytes
