"""Linear layers as inference wants them: plain matrices, in the layout that few rows are fastest with."""

import torch
import torch.distributed
from megatron.core import parallel_state
from torch import Tensor, nn

from parallel.linear import SharedRowsLinear


class Dense:
    """y = x W + b with W as [inputs, outputs]; partial results are summed over the tensor-parallel group if asked.

    With few rows, a matrix that is read along its outputs is up to three times as fast on CPU as the [outputs, inputs]
    that training keeps.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, sums_parts: bool = False) -> None:
        """Takes over a weight.

        Args:
            weight: [outputs, inputs], this rank's part.
            bias: [outputs] or none; added once, after the sum.
            sums_parts: whether each rank has some of the inputs.
        """
        on_cpu = weight.device.type == "cpu"
        self._weight = weight.detach().t().contiguous() if on_cpu else weight.detach().t()
        self._bias = None if bias is None else bias.detach()
        self._sums_parts = sums_parts and parallel_state.get_tensor_model_parallel_world_size() > 1

    def __call__(self, hidden: Tensor) -> Tensor:
        """Maps [rows, inputs] to [rows, outputs]."""
        if self._sums_parts:
            parts = torch.mm(hidden, self._weight)
            torch.distributed.all_reduce(parts, group=parallel_state.get_tensor_model_parallel_group())
            return parts if self._bias is None else parts.add_(self._bias)
        if self._bias is None:
            return torch.mm(hidden, self._weight)
        return torch.addmm(self._bias, hidden, self._weight)


class OutputMatrix:
    """The head's matrix W [V, D]: by far the largest, so how it is multiplied decides the speed of small models.

    On CPU the fastest product depends on the number of rows: x W^T with W^T stored for one row, W x^T for a few, W x^T
    with W^T stored for more. Measured with MKL on two cores, V = 50,304, D = 256: 2.2, 3.8 and 6.7 ms for 1, 8 and 32
    rows; the product that training uses takes 7.1, 12.8 and 17.0 ms.
    """

    FEW_ROWS = 12

    def __init__(self, weight: Tensor) -> None:
        """Takes over the matrix.

        Args:
            weight: [V, D], this rank's part.
        """
        self._weight = weight.detach()
        self._transposed: Tensor | None = None
        self._product: Tensor | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Maps [B, D] to [B, V]; on CPU overwritten by the next call."""
        if self._weight.device.type != "cpu":
            return torch.mm(hidden, self._weight.t())
        if len(hidden) == 1:
            return torch.mm(hidden, self._stored_transposed(), out=self._memory(1, len(self._weight)))
        weight = self._weight if len(hidden) < self.FEW_ROWS else self._stored_transposed().t()
        return torch.mm(weight, hidden.t(), out=self._memory(len(self._weight), len(hidden))).t()

    def _stored_transposed(self) -> Tensor:
        if self._transposed is None:
            self._transposed = self._weight.t().contiguous()
        return self._transposed

    def _memory(self, *shape: int) -> Tensor:
        """Fresh memory costs as much as the product."""
        if self._product is None or self._product.shape != shape:
            self._product = self._weight.new_empty(shape)
        return self._product


def dense_of(layer: nn.Module, sums_parts: bool = False) -> Dense:
    """Takes over a linear layer of the model: torch's, Megatron-core's or one of shared rows."""
    weight, bias = layer.get_parameter("weight"), layer._parameters.get("bias")
    if isinstance(layer, SharedRowsLinear):
        return Dense(weight[layer.rows], None if bias is None else bias[layer.rows])
    return Dense(weight, bias, sums_parts)
