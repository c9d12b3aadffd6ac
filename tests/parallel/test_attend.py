"""Attention of short sequences against torch's fused kernel."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.attend import SHORT, attend

BATCH, HEADS, SIZE = 6, 4, 8


@pytest.mark.parametrize("length", [1, 2, 5, SHORT, SHORT + 1])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_and_gradients(length: int, groups: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(length)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    mask = None
    if masked:
        hidden = torch.rand(BATCH, 1, length, length, generator=generator) < 0.4
        mask = causal & ~hidden | torch.eye(length, dtype=torch.bool)
    shapes = [(BATCH, heads, length, SIZE) for heads in (HEADS, groups, groups)]
    values = [torch.randn(*shape, generator=generator) for shape in shapes]
    gradient = torch.randn(shapes[0], generator=generator)

    def run(function: object, dtype: torch.dtype) -> tuple[Tensor, ...]:
        own = [value.to(dtype).requires_grad_() for value in values]
        result = function(*own)  # type: ignore[operator]
        return result, *torch.autograd.grad(result, own, gradient.to(dtype))

    ours = run(lambda *own: attend(*own, mask), torch.float32)
    exact = run(
        lambda *own: F.scaled_dot_product_attention(*own, attn_mask=causal if mask is None else mask, enable_gqa=True),
        torch.float64,
    )
    for one, right in zip(ours, exact, strict=True):
        torch.testing.assert_close(one.double(), right, rtol=1e-4, atol=1e-5)
