"""The model against numbers recorded from the reference implementation (fp32, tolerance 1e-5)."""

import pytest
import torch

from parallel.inputs import target_mask
from tests.golden_reference import BLOCK_VARIANTS, golden_stage, relative_difference

TOLERANCE = 1e-5


def by_sequence(values: torch.Tensor, num_sequences: int = 2) -> torch.Tensor:
    """[N * B, ...] as the model lays it out -> [B, N - 1, ...] as recorded."""
    return values.view(-1, num_sequences, *values.shape[1:]).transpose(0, 1)[:, :-1]


@pytest.mark.parametrize("case", ["nopad", "pad"])
@pytest.mark.parametrize("name", BLOCK_VARIANTS)
def test_block_logits_and_losses(name: str, case: str) -> None:
    golden, stage = golden_stage(name)
    batch = golden.batch(case)
    with torch.no_grad():
        logits = by_sequence(stage.logits(batch))
        losses = by_sequence(stage(batch))
    recorded = golden.outputs[f"{case}.token_loss"]
    valid = ~recorded.isnan()
    assert torch.equal(valid, batch.mask.view(2, 8, -1)[:, 1:])
    assert relative_difference(logits[valid], golden.outputs[f"{case}.logits"][valid]) < TOLERANCE
    torch.testing.assert_close(losses[valid], recorded[valid], rtol=TOLERANCE, atol=TOLERANCE)
    assert float(losses[valid].mean()) == pytest.approx(float(golden.outputs[f"{case}.loss"]), rel=TOLERANCE)


@pytest.mark.parametrize("name", BLOCK_VARIANTS)
def test_leading_padding_leaks_no_future(name: str) -> None:
    """Only the first real block after leading padding may differ: there the reference sees the future."""
    golden, stage = golden_stage(name)
    batch = golden.batch("leadpad")
    with torch.no_grad():
        losses = by_sequence(stage(batch))
    recorded = golden.outputs["leadpad.token_loss"]
    valid = ~recorded.isnan()
    first = valid.any(dim=2).int().argmax(dim=1)
    agree = valid.clone()
    agree[torch.arange(2), first] = False
    torch.testing.assert_close(losses[agree], recorded[agree], rtol=TOLERANCE, atol=TOLERANCE)
    for row in range(2):
        here = valid[row, first[row]]
        assert not torch.allclose(losses[row, first[row]][here], recorded[row, first[row]][here], rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "case"),
    [
        *((name, "pad") for name in BLOCK_VARIANTS),
        ("main_prefix_b4", "nopad"),
        ("vanilla", "nopad"),
        ("vanilla", "rightpad"),
    ],
)
def test_gradients(name: str, case: str) -> None:
    golden, stage = golden_stage(name)
    batch = golden.batch(case)
    stage.zero_grad()
    losses = stage(batch)
    mask = batch.mask[:, golden.config.unit_length :].sum()
    valid = target_mask(golden.config, batch)
    assert int(valid.sum()) == int(mask)
    (losses * valid).sum().div(mask).backward()
    expected = golden.gradients(case)
    for parameter_name, parameter in stage.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert relative_difference(parameter.grad, expected[parameter_name]) < TOLERANCE, parameter_name


@pytest.mark.parametrize("case", ["nopad", "rightpad", "leftpad"])
def test_vanilla_logits_and_losses(case: str) -> None:
    golden, stage = golden_stage("vanilla")
    batch = golden.batch(case)
    with torch.no_grad():
        logits = stage.logits(batch).transpose(0, 1)
        losses = stage(batch).transpose(0, 1)[:, :-1]
    real = batch.mask
    assert relative_difference(logits[real], golden.outputs[f"{case}.logits"][real]) < TOLERANCE
    recorded = golden.outputs[f"{case}.token_loss"]
    # A padded position has no history of its own; what the reference predicts from one sees the future.
    valid = ~recorded.isnan() & real[:, :-1]
    torch.testing.assert_close(losses[valid], recorded[valid], rtol=TOLERANCE, atol=TOLERANCE)
