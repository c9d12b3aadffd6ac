"""Products of oneDNN and of MKL, whichever the processor, against torch's."""

import platform

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.products import linear, product, uses_onednn
from tests.parallel.conftest import present_processor

SHAPES = [(1, 1, 1), (3, 5, 7), (20, 33, 16), (0, 4, 3)]


@pytest.mark.parametrize(
    ("vendor", "capability", "expected"),
    [
        ("GenuineIntel", "AVX512", False),
        ("GenuineIntel", "AVX2", False),
        ("AuthenticAMD", "AVX512", True),
        ("AuthenticAMD", "AVX2", False),
        ("", "AVX512", True),
    ],
)
def test_onednn_where_it_is_faster(
    monkeypatch: pytest.MonkeyPatch, vendor: str, capability: str, expected: bool
) -> None:
    present_processor(monkeypatch, vendor, capability)
    assert uses_onednn(torch.zeros(1)) == expected
    assert not uses_onednn(torch.zeros(1, dtype=torch.bfloat16))


@pytest.mark.usefixtures("library")
def test_without_mkl_it_is_onednn_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert uses_onednn(torch.zeros(1))


def test_this_processor_has_a_known_capability() -> None:
    assert torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2", "AVX512") or platform.machine() != "x86_64"


def test_the_library_is_the_chosen_one(library: str) -> None:
    with torch.profiler.profile() as profile:
        product(torch.ones(8, 4), torch.ones(3, 4))
    called = {event.key for event in profile.key_averages()}
    chosen = library == "oneDNN", library == "MKL"
    assert ("mkldnn::_linear_pointwise" in called, "aten::mm" in called) == chosen


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    hidden, weight, bias = (torch.randn(*s).to(dtype) for s in ((2, rows, inputs), (outputs, inputs), (outputs,)))
    tolerance = 1e-5 if dtype is torch.float32 else 0.1
    expected = (hidden.double() @ weight.double().t() + bias.double()).to(dtype)
    torch.testing.assert_close(product(hidden, weight, bias), expected, rtol=tolerance, atol=tolerance)
    transposed = weight.t().contiguous().t()
    assert transposed.is_contiguous() == (min(inputs, outputs) == 1)
    torch.testing.assert_close(product(hidden, transposed, bias), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("library")
def test_products_do_without_a_function_that_deepspeed_replaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO 3's adds a bias in place to the product that selective checkpointing keeps."""

    def replaced(*_: object) -> Tensor:
        raise AssertionError

    monkeypatch.setattr(F, "linear", replaced)
    hidden = torch.ones(2, 3, 4)
    assert (product(hidden, torch.ones(5, 4), torch.ones(5)) == 5).all()
    assert (product(hidden.transpose(0, 1), torch.ones(5, 4)) == 4).all()


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("has_bias", [True, False])
def test_gradients(rows: int, inputs: int, outputs: int, has_bias: bool) -> None:
    def gradients(layer: object) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        shapes = ((2, rows, inputs), (outputs, inputs), (outputs,))
        values = [torch.randn(*shape, generator=generator).requires_grad_() for shape in shapes[: 2 + has_bias]]
        result = layer(*values) if has_bias else layer(*values, None)  # type: ignore[operator]
        (result * torch.randn(result.shape, generator=generator)).sum().backward()
        return result.detach(), *(value.grad for value in values if value.grad is not None)

    for ours, theirs in zip(gradients(linear), gradients(F.linear), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_gradients_of_some(needed: tuple[int, ...]) -> None:
    values = [torch.randn(shape) for shape in ((3, 4), (2, 4), (2,))]
    found = []
    for layer in (linear, F.linear):
        own = [value.clone().requires_grad_(index in needed) for index, value in enumerate(values)]
        layer(*own).square().sum().backward()  # type: ignore[operator]
        found.append([value.grad for value in own])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("library")
def test_gradients_of_gradients_are_refused() -> None:
    weight = torch.randn(2, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(linear(torch.randn(3, 4), weight, None).square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.usefixtures("library")
def test_what_needs_no_gradient_gets_none() -> None:
    hidden, weight = torch.randn(3, 4), torch.randn(2, 4, requires_grad=True)
    linear(hidden, weight, None).sum().backward()
    assert hidden.grad is None
    assert weight.grad is not None
