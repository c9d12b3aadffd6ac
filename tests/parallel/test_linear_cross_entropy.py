"""The head's cross entropy in chunks against torch's, which holds all logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.allocations import traced_allocations
from parallel.config import ParallelConfig
from parallel.linear_cross_entropy import linear_cross_entropy, score_targets
from parallel.topology import coordinates, initialize_topology
from tests.processes import run_processes

ROWS, WIDTH, VOCAB = (5, 4), 8, 30
ROW_BYTES = 4 * VOCAB
VALIDS = {"all": 20, "some": 13, "one": 1, "none": 0}


def problem(valid_targets: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(*ROWS, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCAB, WIDTH, generator=generator, dtype=torch.float64)
    targets = torch.randint(VOCAB, ROWS, generator=generator)
    valid = torch.zeros(20, dtype=torch.bool)
    valid[torch.randperm(20, generator=generator)[:valid_targets]] = True
    return hidden.to(dtype), weight.to(dtype), targets, valid.view(ROWS)


def expected(valid_targets: int, factor: float) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, targets, valid = problem(valid_targets)
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = F.cross_entropy((hidden @ weight.t()).flatten(0, 1), targets.flatten(), reduction="none").view(ROWS) * valid
    (loss.sum() * factor).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("valid_targets", VALIDS.values(), ids=VALIDS.keys())
@pytest.mark.parametrize("rows_per_chunk", [1, 3, 7, 20, 1000])
def test_losses_and_gradients(valid_targets: int, rows_per_chunk: int) -> None:
    loss, hidden_gradient, weight_gradient = expected(valid_targets, 0.25)
    hidden, weight, targets, valid = problem(valid_targets, torch.float32)
    hidden.requires_grad_()
    weight.requires_grad_()
    ours = linear_cross_entropy(hidden, weight, targets, valid, rows_per_chunk * ROW_BYTES)
    (ours.sum() * 0.25).backward()
    torch.testing.assert_close(ours.detach().double(), loss, rtol=1e-5, atol=1e-5)
    for gradient, right in ((hidden.grad, hidden_gradient), (weight.grad, weight_gradient)):
        assert gradient is not None
        torch.testing.assert_close(gradient.double(), right, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        again = linear_cross_entropy(hidden, weight, targets, valid, rows_per_chunk * ROW_BYTES)
    torch.testing.assert_close(again, ours.detach(), rtol=1e-6, atol=1e-6)


def test_logits_of_all_targets_are_never_held() -> None:
    rows, width, vocab, chunk = 1024, 8, 4096, 2**20
    hidden, weight = torch.randn(rows, width, requires_grad=True), torch.randn(vocab, width, requires_grad=True)
    targets, valid = torch.zeros(rows, dtype=torch.long), torch.ones(rows, dtype=torch.bool)
    with traced_allocations() as taken:
        linear_cross_entropy(hidden, weight, targets, valid, chunk).sum().backward()
    assert chunk <= taken.peak < 3 * chunk < 4 * rows * vocab


def test_bf16_is_as_good_as_its_logits() -> None:
    loss, hidden_gradient, weight_gradient = expected(13, 1.0)
    hidden, weight, targets, valid = problem(13, torch.bfloat16)
    hidden.requires_grad_()
    weight.requires_grad_()
    ours = linear_cross_entropy(hidden, weight, targets, valid, 4 * ROW_BYTES)
    ours.sum().backward()
    assert ours.dtype is torch.float32
    torch.testing.assert_close(ours.detach().double(), loss, rtol=0.02, atol=0.05)
    for gradient, right in ((hidden.grad, hidden_gradient), (weight.grad, weight_gradient)):
        assert gradient is not None
        assert gradient.dtype is torch.bfloat16
        torch.testing.assert_close(gradient.double(), right, rtol=0.05, atol=0.05)


def test_extreme_logits_stay_finite() -> None:
    hidden = torch.tensor([[300.0], [-300.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.0]], requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1, 1]), torch.tensor([True, True]))
    assert loss.tolist() == [600.0, 0.0]
    loss.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.tolist() == [[2.0], [0.0]]


def test_targets_may_count_differently() -> None:
    factors = torch.arange(20.0).view(ROWS)

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        hidden, weight, targets, valid = problem(13, dtype)
        values = [hidden.requires_grad_(), weight.requires_grad_()]
        if dtype is torch.float32:
            loss = linear_cross_entropy(hidden, weight, targets, valid, 4 * ROW_BYTES)
        else:
            logits = (hidden @ weight.t()).flatten(0, 1)
            loss = F.cross_entropy(logits, targets.flatten(), reduction="none").view(ROWS) * valid
        return list(torch.autograd.grad((loss * factors).sum(), values))

    for ours, right in zip(gradients(torch.float32), gradients(torch.float64), strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=1e-4, atol=1e-4)


def test_scores() -> None:
    hidden, weight, targets, valid = problem(13, torch.float32)
    best = (hidden @ weight.t()).argmax(dim=-1)
    targets[::2] = best[::2]
    scores = score_targets(hidden, weight, targets, valid, 4 * ROW_BYTES)
    with torch.no_grad():
        assert torch.equal(scores[0], linear_cross_entropy(hidden, weight, targets, valid, 4 * ROW_BYTES))
    assert torch.equal(scores[1].bool(), (targets == best) & valid)


def split_vocabulary(valid_targets: int) -> list[list[float]]:
    """What a rank of two computes, as lists; the gradient of the hidden states summed over both."""
    initialize_topology(ParallelConfig(tensor=2))
    hidden, weight, targets, valid = problem(valid_targets, torch.float32)
    mine = weight.chunk(2)[coordinates().tensor_rank].clone().requires_grad_()
    loss = linear_cross_entropy(hidden.requires_grad_(), mine, targets, valid, 7 * ROW_BYTES // 2)
    loss.sum().backward()
    assert hidden.grad is not None
    assert mine.grad is not None
    torch.distributed.all_reduce(hidden.grad)
    with torch.no_grad():
        scores = score_targets(hidden, mine, targets, valid, 7 * ROW_BYTES // 2)
    return [one.tolist() for one in (loss, hidden.grad, mine.grad, scores)]


@pytest.mark.slow
@pytest.mark.parametrize("valid_targets", [13, 0])
def test_a_vocabulary_that_is_split(valid_targets: int) -> None:
    loss, hidden_gradient, weight_gradient = expected(valid_targets, 1.0)
    hidden, weight, targets, valid = problem(valid_targets, torch.float32)
    results = run_processes(2, split_vocabulary, valid_targets)
    for rank, result in enumerate(results):
        ours, hidden_part, weight_part, scores = (torch.tensor(one) for one in result)
        torch.testing.assert_close(ours.double(), loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(hidden_part.double(), hidden_gradient, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(weight_part.double(), weight_gradient.chunk(2)[rank], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(scores, score_targets(hidden, weight, targets, valid), rtol=1e-5, atol=1e-5)
