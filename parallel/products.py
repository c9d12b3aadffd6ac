"""Matrix products by the fastest library there is for the device.

On x86, torch.mm calls MKL. oneDNN, which torch carries as well, multiplied fp32 matrices 1.1 to 1.3 times as fast on
an AMD EPYC with AVX-512 (Zen 4), of all shapes that training meets, but where the left matrix is transposed
(gradients of weights: 0.6 to 1.2 times). On the other processors that were measured MKL is the better choice: on an
Intel Xeon the head's matrix took 157 to 212 GFLOP/s by MKL, 83 to 116 by oneDNN; on AMD EPYCs without AVX-512 (Zen 3)
a step of the paper's 5M model was 1.05 to 1.08 times as fast by MKL on one machine, 0.95 times on another. On GPUs
torch.mm is as good as any. torch (2.11 to 2.13) offers oneDNN's fp32 products under a private name only.
"""

from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.processor import processor_entry


def uses_onednn(values: Tensor) -> bool:
    """Whether products of such values go to oneDNN."""
    if values.device.type != "cpu" or values.dtype is not torch.float32 or not torch.backends.mkldnn.is_available():
        return False
    if not torch.backends.mkl.is_available():
        return True
    return processor_entry("vendor_id") != "GenuineIntel" and torch.backends.cpu.get_cpu_capability() == "AVX512"


def product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product x W^T + b; autograd does not see it.

    Args:
        left: x [..., k].
        right: W [m, k], of any strides.
        bias: b [m] or none.
    """
    if uses_onednn(left) and left.numel():
        result: Tensor = torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")
        return result
    # Not F.linear: DeepSpeed's ZeRO 3 replaces it in the whole process, by one that adds the bias in place to a product
    # which selective checkpointing keeps, so that it would be added twice.
    rows = left.flatten(0, -2)
    result = rows @ right.t() if bias is None else torch.addmm(bias, rows, right.t())
    return result.view(*left.shape[:-1], len(right))


def linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, group: torch.distributed.ProcessGroup | None = None
) -> Tensor:
    """The same for training.

    Args:
        hidden: x [..., k].
        weight: W [m, k].
        bias: b [m] or none.
        group: processes over which the gradient of `hidden` is summed, while that of the weight is computed.
    """
    factors: Tensor = _Factors.apply(hidden, weight)
    result: Tensor = _Linear.apply(factors, weight, bias, group, factors.grad_fn, hidden.requires_grad)
    return result


class _Factors(torch.autograd.Function):
    """Keeps what the gradients of a product are computed from, before the product is.

    Where a layer is computed again, that ends as soon as all is there that it keeps: so without its last product.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *arrived: Tensor | None) -> tuple[Tensor | None, None]:
        return arrived[0], None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, group: Any, factors: Any, has_gradient: bool
    ) -> Tensor:
        ctx.group, ctx.factors, ctx.hidden_has_gradient = group, factors, has_gradient
        return product(hidden, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *arrived: Tensor) -> tuple[Tensor | None, ...]:
        gradient = arrived[0].contiguous()
        _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        if ctx.factors is None:  # of neither
            return None, None, gradient.flatten(0, -2).sum(dim=0), None, None, None
        hidden, weight = ctx.factors.saved_tensors
        hidden_gradient = product(gradient, weight.t()) if ctx.hidden_has_gradient else None
        sum_done = None
        if ctx.group is not None and hidden_gradient is not None:
            sum_done = torch.distributed.all_reduce(hidden_gradient, group=ctx.group, async_op=True)
        rows = gradient.flatten(0, -2)
        weight_gradient = rows.t() @ hidden.flatten(0, -2) if needs_weight else None
        bias_gradient = rows.sum(dim=0) if needs_bias else None
        if sum_done is not None:
            sum_done.wait()
        return hidden_gradient, weight_gradient, bias_gradient, None, None, None
