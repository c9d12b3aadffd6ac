"""Matrices in oneDNN's packed layout, for products of few rows on CPU.

torch.mm hands such products to a BLAS that is made for square ones: a head of 50,304 x 256 behind 8 rows takes it 3 to
13 ms on two cores, by layout and transposition; oneDNN's packed product takes 1.9, and is as fast as any for 1 and for
4,096 rows. torch (2.11 to 2.13) offers it to compiled graphs alone, through two operators that have no public name.
"""

import torch
from torch import Tensor

# Rows that the packed layout is chosen for. Measured: made for 8 to 256 rows, it serves any number of rows equally
# well; made for one row, it is slow with more.
ROWS_OF_LAYOUT = 32


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN takes this matrix."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype is torch.float32


class PackedMatrix:
    """A matrix W that is only multiplied with.

    Args:
        weight: [outputs, inputs]; what is changed in it later has no effect.
    """

    def __init__(self, weight: Tensor) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS_OF_LAYOUT)

    def product(self, hidden: Tensor, bias: Tensor | None) -> Tensor:
        """Maps x [rows, inputs] to x W^T + b."""
        result: Tensor = torch.ops.mkldnn._linear_pointwise(hidden, self._packed, bias, "none", [], "")
        return result
