"""Documents that are kept apart: packed into one sequence, each gives what it gives alone."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from parallel.config import ModelConfig, ParallelConfig
from parallel.inputs import MicroBatch, count_targets, prepare_inputs, target_mask
from parallel.schedule import loss_sums, masked_loss
from parallel.stage import Stage, build_stage
from train.selftest_models import MODELS

# Blocks of each of the three documents that fill a sequence of eight; left and right pads of each.
BLOCKS = (3, 1, 4)
PADS = ((2, 1), (0, 3), (3, 0))
VARIANTS = ("block", "vanilla", "cross-attention", "Llama", "RoBERTa", "one token per block", "blocks of eight")

pytestmark = pytest.mark.usefixtures("single_process")


def packed(config: ModelConfig) -> MicroBatch:
    """One sequence of three documents, padded to blocks of the model."""
    length = config.unit_length
    ids = torch.randint(1, config.vocab_size, (1, config.sequence_length), generator=torch.Generator().manual_seed(3))
    scale = config.sequence_length // length // sum(BLOCKS)
    units = torch.tensor([blocks * scale for blocks in BLOCKS])
    documents = torch.arange(3).repeat_interleave(units * length)[None]
    mask = torch.ones_like(ids, dtype=torch.bool)
    for start, stop, pads in zip((units.cumsum(0) - units) * length, units.cumsum(0) * length, PADS, strict=True):
        if length > 3:
            mask[0, start : start + pads[0]] = False
            mask[0, stop - pads[1] : stop] = False
    return MicroBatch(ids, mask, documents)


def alone(batch: MicroBatch, document: int) -> tuple[MicroBatch, slice]:
    """A document at the beginning of a sequence of its own, and where its slots lay."""
    assert batch.documents is not None
    slots = torch.nonzero(batch.documents[0] == document).flatten()
    where = slice(int(slots[0]), int(slots[-1]) + 1)
    ids, mask = torch.ones_like(batch.token_ids), torch.zeros_like(batch.mask)
    ids[:, : len(slots)] = batch.token_ids[:, where]
    mask[:, : len(slots)] = batch.mask[:, where]
    return MicroBatch(ids, mask), where


def by_slot(config: ModelConfig, values: Tensor) -> Tensor:
    """Values laid out like targets -> [S], of the one sequence; the first unit, which is no target, is 0."""
    flat = values.reshape(-1)[: config.sequence_length - config.unit_length]
    return torch.cat((flat.new_zeros(config.unit_length), flat))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_packed_document_is_as_if_alone(name: str) -> None:
    """Loss of each token, so positions begin anew; and the gradients add up."""
    config = MODELS[name]
    stage = build_stage(config, ParallelConfig())
    batch = packed(config)
    losses = by_slot(config, stage(batch))
    valid = by_slot(config, target_mask(config, batch))
    gradients = gradients_of(stage, batch)
    total = [torch.zeros_like(gradient) for gradient in gradients]
    for document in range(3):
        single, where = alone(batch, document)
        expected = by_slot(config, stage(single))[: where.stop - where.start]
        expected_valid = by_slot(config, target_mask(config, single))[: where.stop - where.start]
        assert torch.equal(valid[where], expected_valid)
        torch.testing.assert_close(losses[where][valid[where]], expected[expected_valid], rtol=1e-5, atol=1e-5)
        if expected_valid.any():
            total = [a + b for a, b in zip(total, gradients_of(stage, single), strict=True)]
    assert valid.any()
    for together, summed in zip(gradients, total, strict=True):
        torch.testing.assert_close(together, summed, rtol=1e-4, atol=1e-5)


def gradients_of(stage: Stage, batch: MicroBatch) -> list[Tensor]:
    stage.zero_grad()
    masked_loss(stage(batch), target_mask(stage.model_config, batch)).backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in stage.parameters()]


@pytest.mark.parametrize("name", ["block", "vanilla"])
def test_nothing_crosses_from_one_document_to_the_next(name: str) -> None:
    """Bit for bit; without isolation the same change is felt, or the test is blind."""
    config = MODELS[name]
    stage = build_stage(config, ParallelConfig())
    batch = packed(config)
    assert batch.documents is not None
    changed = replace(
        batch, token_ids=torch.where(batch.documents == 0, (batch.token_ids + 1) % config.vocab_size, batch.token_ids)
    )
    later = by_slot(config, target_mask(config, batch)) & (batch.documents[0] > 0)
    first, second = (by_slot(config, stage(one))[later] for one in (batch, changed))
    assert torch.equal(first, second)
    open_batches = [replace(one, documents=None) for one in (batch, changed)]
    first, second = (by_slot(config, stage(one))[later] for one in open_batches)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", ["block", "vanilla"])
def test_the_first_block_of_a_document_is_no_target(name: str) -> None:
    config = MODELS[name]
    batch = packed(config)
    assert batch.documents is not None
    begins = torch.zeros(config.sequence_length, dtype=torch.bool)
    for start in (batch.documents[0].diff() != 0).nonzero().flatten() + 1:
        begins[start : start + config.unit_length] = True
    begins[: config.unit_length] = True
    valid = by_slot(config, target_mask(config, batch)).bool()
    assert torch.equal(valid, batch.mask[0] & ~begins)
    assert count_targets(config, batch) == valid.sum()
    sums = loss_sums(
        config, torch.ones_like(target_mask(config, batch), dtype=torch.float32), target_mask(config, batch)
    )
    assert sums.loss.sum() == sums.count.sum() == valid.sum()


def test_one_document_without_padding_needs_no_mask() -> None:
    config = MODELS["block"]
    ids = torch.ones(2, config.sequence_length, dtype=torch.int64)
    batch = MicroBatch(ids, torch.ones_like(ids, dtype=torch.bool), torch.tensor([[5], [6]]).expand_as(ids))
    assert prepare_inputs(config, batch).global_mask is None
