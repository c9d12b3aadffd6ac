"""No output depends on a later token. Compared bit for bit: a leak too small for a tolerance is still a leak."""

from typing import Any

import pytest
import torch
from torch import Tensor

from inference.generator import Generator
from parallel.component_config import DecoderConfig
from parallel.config import ModelConfig, ParallelConfig
from parallel.inputs import MicroBatch, prepare_inputs
from parallel.schedule import run_schedule
from parallel.stage import Stage, build_stage
from parallel.structure import piece_names
from parallel.topology import coordinates, initialize_topology
from tests.processes import run_processes
from train.selftest_models import MODELS, VARIANTS

VOCAB_SIZE = 32
LENGTH = 16
SHAPES = [*(("block", length, prefix) for length in (1, 2, 4) for prefix in (1, 2, 3)), ("vanilla", 4, 2)]
PADDINGS = ("none", "ragged", "whole blocks")


def small_config(architecture: str = "block", length: int = 4, prefix: int = 2) -> ModelConfig:
    stack = DecoderConfig(num_layers=2, hidden_size=16, num_attention_heads=2)
    shape: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "sequence_length": LENGTH, "initializer_std": 0.5}
    if architecture == "vanilla":
        return ModelConfig(architecture="vanilla", decoder=stack, **shape)
    return ModelConfig(block_length=length, prefix_length=prefix, block_decoder=stack, token_decoder=stack, **shape)


def padded_batch(padding: str) -> MicroBatch:
    """Two sequences; the second is padded at its start, middle and end, in blocks of 4 or across them."""
    ids = torch.randint(0, VOCAB_SIZE, (2, LENGTH), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids, dtype=torch.bool)
    if padding == "ragged":
        mask[1, [0, 1, 6, 7, 8, 15]] = False
    if padding == "whole blocks":
        mask[1, [*range(4), *range(8, 12)]] = False
    return MicroBatch(ids, mask)


def with_token_changed(batch: MicroBatch, position: int) -> MicroBatch:
    """Another id at one position of every sequence."""
    ids = batch.token_ids.clone()
    ids[:, position] = (ids[:, position] + 5) % VOCAB_SIZE
    return MicroBatch(ids, batch.mask)


def by_target(config: ModelConfig, values: Tensor) -> Tensor:
    """Outputs in the model's layout -> [B, S - L, ...]: entry t belongs to target token L + t."""
    if not config.is_block:
        return values.transpose(0, 1)[:, :-1]
    rows = values.view(config.num_blocks, 2, config.block_length, *values.shape[2:])[:-1]
    return rows.transpose(0, 1).flatten(1, 2)


def check_causality(config: ModelConfig, outputs: dict[int, Tensor], shown: int) -> None:
    """Checks what changes when the token at a position changes.

    Args:
        config: the model.
        outputs: per changed position the outputs by target; -1 holds the unchanged ones.
        shown: the first target that may differ is the changed position plus this; 1 for logits, 0 for losses, which
            read the target itself.
    """
    first_target = config.unit_length
    for position in range(LENGTH):
        same = max(0, position + shown - first_target)
        before, after = outputs[-1], outputs[position]
        assert torch.equal(before[:, :same], after[:, :same]), f"token {position} leaks into an earlier output"
        # The first sequence is never padded, so there the token must reach some later output, or the test is blind.
        if same < before.shape[1]:
            assert not torch.equal(before[0, same:], after[0, same:]), f"token {position} has no effect"


def logits_for_each_change(stage: Stage, batch: MicroBatch) -> dict[int, Tensor]:
    config = stage.model_config
    with torch.no_grad():
        return {
            position: by_target(config, stage.logits(batch if position < 0 else with_token_changed(batch, position)))
            for position in range(-1, LENGTH)
        }


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(("architecture", "length", "prefix"), SHAPES)
def test_no_logit_sees_a_later_token(architecture: str, length: int, prefix: int, padding: str) -> None:
    stage = build_stage(small_config(architecture, length, prefix), ParallelConfig())
    batch = padded_batch(padding)
    check_causality(stage.model_config, logits_for_each_change(stage, batch), shown=1)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", VARIANTS)
def test_no_logit_of_a_variant_sees_a_later_token(name: str, padding: str) -> None:
    shape = {"vocab_size": VOCAB_SIZE, "sequence_length": LENGTH, "initializer_std": 0.5}
    stage = build_stage(MODELS[name].model_copy(update=shape), ParallelConfig())
    batch = padded_batch(padding)
    check_causality(stage.model_config, logits_for_each_change(stage, batch), shown=1)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("length", [1, 2, 4])
def test_no_context_embedding_sees_a_later_block(length: int, padding: str) -> None:
    stage = build_stage(small_config(length=length), ParallelConfig())
    batch = padded_batch(padding)
    names = stage.names[: stage.names.index("token_decoder.input")]

    def contexts(one: MicroBatch) -> Tensor:
        with torch.no_grad():
            return stage.run(None, prepare_inputs(stage.model_config, one), names)

    before = contexts(batch)
    for position in range(LENGTH):
        after = contexts(with_token_changed(batch, position))
        block = position // length
        assert torch.equal(before[:block], after[:block])
        assert not torch.equal(before[block:, 0], after[block:, 0])


@pytest.mark.parametrize(("architecture", "length"), [("block", 2), ("block", 4), ("vanilla", 1)])
def test_wholly_padded_blocks_change_nothing(architecture: str, length: int) -> None:
    stage = build_stage(small_config(architecture, length), ParallelConfig())
    batch = padded_batch("whole blocks")
    other = MicroBatch(torch.where(batch.mask, batch.token_ids, (batch.token_ids + 3) % VOCAB_SIZE), batch.mask)
    with torch.no_grad():
        before, after = (by_target(stage.model_config, stage.logits(one)) for one in (batch, other))
    # What directly follows padding is predicted from it: its only input is the padded block itself.
    unit = stage.model_config.unit_length
    real = batch.mask[:, unit:] & batch.mask[:, :-unit]
    assert torch.equal(before[real], after[real])
    assert not torch.equal(other.token_ids, batch.token_ids)


@pytest.mark.parametrize("architecture", ["block", "vanilla"])
def test_sequences_of_a_batch_do_not_see_each_other(architecture: str) -> None:
    stage = build_stage(small_config(architecture), ParallelConfig())
    batch = padded_batch("ragged")
    ids = batch.token_ids.clone()
    ids[1] = (ids[1] + 1) % VOCAB_SIZE
    with torch.no_grad():
        before, after = (
            by_target(stage.model_config, stage.logits(MicroBatch(one, batch.mask))) for one in (batch.token_ids, ids)
        )
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


@pytest.mark.parametrize("architecture", ["block", "vanilla"])
def test_generation_sees_no_neighbour_and_no_later_token(architecture: str) -> None:
    generator = Generator(build_stage(small_config(architecture), ParallelConfig()), pad_id=0)
    prompt = [3, 9, 27, 14, 5]
    neighbours = [[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 8]]
    first, second = (generator.generate([prompt, other], 9) for other in neighbours)
    assert first[0] == second[0]
    assert first[1] != second[1]
    for count in range(1, 9):
        assert generator.generate([prompt], count) == [first[0][:count]]
        assert generator.generate([prompt + first[0][:count]], 9 - count)[0] == first[0][count:] or (
            generator.stage.model_config.is_block and count % 4
        ), "a prompt that ends elsewhere in a block is cut into other blocks"


def _check_tensor_parallel(sequence_parallel: bool) -> None:
    parallel = ParallelConfig(tensor=2, sequence_parallel=sequence_parallel)
    initialize_topology(parallel)
    for architecture in ("block", "vanilla"):
        stage = build_stage(small_config(architecture), parallel)
        for padding in PADDINGS:
            check_causality(stage.model_config, logits_for_each_change(stage, padded_batch(padding)), shown=1)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_under_tensor_parallelism(sequence_parallel: bool) -> None:
    run_processes(2, _check_tensor_parallel, sequence_parallel)


def _check_pipeline(architecture: str) -> int:
    """Checks the losses of the last stage, through the real schedule; returns how many forward passes were checked."""
    parallel = ParallelConfig(pipeline=2)
    initialize_topology(parallel)
    stage = build_stage(small_config(architecture), parallel)
    assert 0 < len(stage.names) < len(piece_names(stage.model_config))
    checked = 0
    for padding in PADDINGS:
        batch = padded_batch(padding)
        batches = [batch, *(with_token_changed(batch, position) for position in range(LENGTH))]
        seen: list[Tensor] = []

        def recorded(one: MicroBatch, seen: list[Tensor] = seen) -> Tensor:
            output: Tensor = stage(one)
            seen.append(output.detach().clone())
            return output

        run_schedule(stage, parallel, batches, forward_only=True, forward=recorded)
        if coordinates().is_last_stage:
            losses = {index - 1: by_target(stage.model_config, one) for index, one in enumerate(seen)}
            check_causality(stage.model_config, losses, shown=0)
            checked += len(losses)
    return checked


@pytest.mark.parametrize("architecture", ["block", "vanilla"])
def test_under_a_pipeline(architecture: str) -> None:
    assert run_processes(2, _check_pipeline, architecture) == [0, len(PADDINGS) * (LENGTH + 1)]
