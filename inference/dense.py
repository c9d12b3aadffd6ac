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
        self.outputs = self._weight.shape[1]

    def __call__(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Maps [rows, inputs] to [rows, outputs].

        Args:
            hidden: the rows.
            out: where the result goes; new memory by default.
        """
        if self._sums_parts:
            parts = torch.mm(hidden, self._weight, out=out)
            torch.distributed.all_reduce(parts, group=parallel_state.get_tensor_model_parallel_group())
            return parts if self._bias is None else parts.add_(self._bias)
        if self._bias is None:
            return torch.mm(hidden, self._weight, out=out)
        return torch.addmm(self._bias, hidden, self._weight, out=out)


def dense_of(layer: nn.Module, sums_parts: bool = False) -> Dense:
    """Takes over a linear layer of the model: torch's, Megatron-core's or one of shared rows."""
    weight, bias = layer.get_parameter("weight"), layer._parameters.get("bias")
    if isinstance(layer, SharedRowsLinear):
        return Dense(weight[layer.rows], None if bias is None else bias[layer.rows])
    return Dense(weight, bias, sums_parts)
