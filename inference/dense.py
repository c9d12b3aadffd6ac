"""Linear layers as inference wants them: plain matrices, packed for the products of few rows that decoding makes."""

import torch
import torch.distributed
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor, nn

from inference.cpu_kernels.kernels import normed_linear_kernel
from inference.packed_matrix import PackedMatrix, can_pack
from parallel.linear import SharedRowsLinear


class Dense:
    """y = x W^T + b; partial results are summed over the tensor-parallel group if asked."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, sums_parts: bool = False) -> None:
        """Takes over a weight.

        Args:
            weight: [outputs, inputs], this rank's part.
            bias: [outputs] or none; added once, after the sum.
            sums_parts: whether each rank has some of the inputs.
        """
        self._sums_parts = sums_parts and parallel_state.get_tensor_model_parallel_world_size() > 1
        self._weight = weight.detach()
        self._bias = None if bias is None else bias.detach()
        self._packed = PackedMatrix(self._weight) if can_pack(self._weight) else None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Maps [rows, inputs] to [rows, outputs]."""
        if not self._sums_parts:
            return self._product(hidden, self._bias)
        parts = self._product(hidden, None)
        torch.distributed.all_reduce(parts, group=parallel_state.get_tensor_model_parallel_group())
        return parts if self._bias is None else parts.add_(self._bias)

    def _product(self, hidden: Tensor, bias: Tensor | None) -> Tensor:
        if self._packed is not None:
            return self._packed.product(hidden, bias)
        return F.linear(hidden, self._weight, bias)


def dense_of(layer: nn.Module, sums_parts: bool = False) -> Dense:
    """Takes over a linear layer of the model: torch's, Megatron-core's or one of shared rows."""
    weight, bias = layer.get_parameter("weight"), layer._parameters.get("bias")
    if isinstance(layer, SharedRowsLinear):
        return Dense(weight[layer.rows], None if bias is None else bias[layer.rows])
    return Dense(weight, bias, sums_parts)


class NormedLinear:
    """A norm and a linear layer behind it, by a C++ kernel where there is one.

    Args:
        norm: over the last dimension.
        linear: torch's or Megatron-core's; of the latter this rank's outputs.
    """

    def __init__(self, norm: nn.Module, linear: nn.Module) -> None:
        self._kernel = normed_linear_kernel(norm, linear)
        self._norm = norm
        self._dense = dense_of(linear) if self._kernel is None else None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Maps [B, D] to [B, outputs], which may be overwritten by the next call."""
        if self._kernel is not None:
            return self._kernel(hidden)
        assert self._dense is not None
        return self._dense(self._norm(hidden))

    def release(self) -> None:
        """Gives memory back that is kept for the next call."""
        if self._kernel is not None:
            self._kernel.release()
