"""The memory model's activations against what torch's allocator really takes, piece by piece."""

import pytest
import torch
from torch import Tensor

from benchmarks.allocations import traced_allocations
from parallel.attend import SHORT
from parallel.checkpointing import POLICIES
from parallel.config import ModelConfig, ParallelConfig
from parallel.decoder_layer import DecoderLayer
from parallel.inputs import MicroBatch, ModelInputs, prepare_inputs
from parallel.planning.activations import piece_activations
from parallel.planning.workload import Workload
from parallel.stage import Stage, build_stage
from train.selftest_models import MODELS

SEQUENCES = 2
# The norms of Qwen3's heads make copies that depend on how the heads lie.
LOOSE = {"Qwen3": 0.08}


def kept(stage: Stage, piece: str, hidden: Tensor | None, inputs: ModelInputs) -> tuple[int, Tensor]:
    """Bytes that a piece's forward pass leaves, its output included; the output."""
    module = stage.piece(piece)
    module(hidden, inputs)  # tables that are computed once
    with traced_allocations() as traced:
        output = module(hidden, inputs)
    return traced.left, output


def inputs_of(config: ModelConfig) -> ModelInputs:
    ids = torch.arange(SEQUENCES * config.sequence_length).view(SEQUENCES, -1) % config.vocab_size
    return prepare_inputs(config, MicroBatch(ids, torch.ones_like(ids, dtype=torch.bool)))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("name", MODELS)
def test_pieces_keep_what_is_predicted(name: str) -> None:
    config = MODELS[name]
    stage, inputs = build_stage(config, ParallelConfig()), inputs_of(config)
    work = Workload(config, ParallelConfig(), SEQUENCES, 1, "fp32", on_gpu=False)
    hidden: Tensor | None = None
    for piece in stage.names:
        layer = stage.piece(piece)
        for policy in POLICIES if isinstance(layer, DecoderLayer) else POLICIES[:1]:
            if isinstance(layer, DecoderLayer):
                layer.policy = policy
            measured, output = kept(stage, piece, hidden, inputs)
            predicted = piece_activations(work, piece, policy).kept
            assert predicted == pytest.approx(measured, rel=LOOSE.get(name, 0.02)), (piece, policy)
        hidden = output.detach().requires_grad_()


def test_long_sequences_attend_by_the_fused_kernel() -> None:
    """Beyond parallel/attend.py's limit other tensors are kept."""
    config = MODELS["vanilla"].model_copy(update={"sequence_length": 2 * SHORT})
    stage, inputs = build_stage(config, ParallelConfig()), inputs_of(config)
    work = Workload(config, ParallelConfig(), SEQUENCES, 1, "fp32", on_gpu=False)
    hidden = stage.piece("vanilla.input")(None, inputs).detach().requires_grad_()
    measured, _ = kept(stage, "vanilla.layers.0", hidden, inputs)
    assert piece_activations(work, "vanilla.layers.0").kept == pytest.approx(measured, rel=0.02)
