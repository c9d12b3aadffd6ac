"""Every variant of our model: its list of parameters, its export, and the modelling file that goes with it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoints.errors import CheckpointError
from checkpoints.fragments import FragmentReader
from checkpoints.trained_model import find_trained_model
from checkpoints.weights.conversion_check import compare
from checkpoints.weights.huggingface_config import huggingface_from_model
from checkpoints.weights.modeling_block_transformer import BlockTransformer
from checkpoints.weights.parameter_shapes import parameter_shapes
from checkpoints.weights.piecewise_forward import piecewise_logits
from checkpoints.weights.reference_config import reference_from_model
from checkpoints.weights.tensor_output import PlannedTensor, write_tensors
from checkpoints.weights.weight_source import open_vanilla_source, open_weight_source
from parallel.config import ParallelConfig
from parallel.inputs import MicroBatch
from parallel.stage import build_stage
from tests.checkpoints.weights.models import (
    converted,
    random_tokens,
    same_tensors,
    save_ours,
    save_transformers,
)
from tests.checkpoints.weights.resaving import LAYOUT, resave
from tests.golden_reference import relative_difference
from tests.processes import run_processes
from train.selftest_models import MODELS

BLOCK_MODELS = [name for name, model in MODELS.items() if model.is_block]


@pytest.mark.parametrize("name", MODELS)
def test_the_list_of_parameters_is_that_of_the_model(name: str) -> None:
    stage = build_stage(MODELS[name], ParallelConfig(), seed=None)
    built = {parameter: tuple(tensor.shape) for parameter, tensor in stage.named_parameters()}
    assert parameter_shapes(MODELS[name]) == built


@pytest.mark.parametrize("name", BLOCK_MODELS)
def test_a_variant_computes_the_same_in_plain_torch(tmp_path: Path, name: str) -> None:
    """The check of the conversion itself compares the modelling file with our pieces; here also padding."""
    ours, exported = save_ours(tmp_path / "ours", MODELS[name]), tmp_path / "exported"
    assert converted(ours, exported, "huggingface").relative <= 1e-5
    model = BlockTransformer.from_pretrained(exported)
    ids = random_tokens(2, MODELS[name].sequence_length)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, : max(1, MODELS[name].block_length - 1)] = False
    mask[1, -MODELS[name].block_length - 1 :] = False
    stage = find_trained_model(ours).load()
    with torch.no_grad():
        expected = stage.logits(MicroBatch(ids, mask)).view(-1, 2, *model(ids).shape[2:])[:-1].transpose(0, 1)
        actual = model(ids, mask)
    valid = mask.view(2, -1, MODELS[name].block_length)[:, 1:]
    assert relative_difference(actual[valid], expected[valid]) <= 1e-5


def test_pieces_one_by_one_are_the_whole_model(tmp_path: Path) -> None:
    name = "Qwen2, tied"
    ids = random_tokens()
    ours = save_ours(tmp_path / "ours", MODELS[name])
    with open_weight_source(ours) as source, torch.no_grad():
        pieces = piecewise_logits(source.model, source.read, ids)
        batch = MicroBatch(ids, torch.ones_like(ids, dtype=torch.bool))
        whole = find_trained_model(ours).load().logits(batch)
    assert relative_difference(pieces, whole.view(8, 2, *whole.shape[1:])[:-1].transpose(0, 1)) <= 1e-6


def test_an_exported_block_transformer_can_be_imported_again(tmp_path: Path) -> None:
    ours = save_ours(tmp_path / "ours", MODELS["Llama"])
    converted(ours, tmp_path / "exported", "huggingface", maximum_file_bytes=50_000)
    assert (tmp_path / "exported" / "model.safetensors.index.json").is_file()
    converted(tmp_path / "exported", tmp_path / "again", "ours")
    with open_weight_source(ours) as first, open_weight_source(tmp_path / "again") as second:
        assert first.model == second.model
        assert all(torch.equal(first.read(name), second.read(name)) for name in first.names)


def test_what_another_format_cannot_say_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no Hugging Face architecture of gpt_neox, llama"):
        huggingface_from_model(MODELS["vanilla, multi-query"], "float32")
    for name, reason in {
        "Llama": "backbone.norm=rms_norm",
        "cross-attention": "token_decoder_input=cross_attention",
        "vanilla": "architecture=vanilla",
    }.items():
        with pytest.raises(CheckpointError, match=f"the reference code has no model with {reason}"):
            reference_from_model(MODELS[name])


def test_a_model_that_computes_something_else_is_found(tmp_path: Path) -> None:
    ours = save_ours(tmp_path / "ours", MODELS["block"])
    converted(ours, tmp_path / "exported", "huggingface")
    tensors = load_file(tmp_path / "exported" / "model.safetensors")
    for wrong in (0.01, float("nan")):
        changed = dict(tensors)
        changed["block_decoder.layers.1.attention.query_key_value.weight"] = (
            tensors["block_decoder.layers.1.attention.query_key_value.weight"] + wrong
        )
        planned = [PlannedTensor(name, tuple(tensor.shape), tensor.dtype) for name, tensor in changed.items()]
        write_tensors(tmp_path / "exported", planned, changed.__getitem__)
        with open_weight_source(ours) as source, pytest.raises(CheckpointError, match="computes something else"):
            compare(source, tmp_path / "exported")


def test_a_block_transformer_is_no_vanilla_source(tmp_path: Path) -> None:
    ours = save_ours(tmp_path / "ours", MODELS["block"])
    with pytest.raises(CheckpointError, match="is a Block Transformer; give a vanilla model"):
        open_vanilla_source(ours)


@pytest.mark.slow
def test_saving_from_two_by_two_processes_gives_the_same_file(tmp_path: Path) -> None:
    source = save_transformers(tmp_path / "source", "Llama", torch.bfloat16, num_key_value_heads=2)
    converted(source, tmp_path / "ours", "ours")
    run_processes(LAYOUT.world_size, resave, tmp_path / "ours", tmp_path / "resaved")
    with FragmentReader(tmp_path / "resaved" / "checkpoints" / "step_00000000") as reader:
        assert len(reader.names("weight")) == len(parameter_shapes(find_trained_model(tmp_path / "ours").model))
    converted(tmp_path / "resaved", tmp_path / "back", "huggingface")
    assert same_tensors(tmp_path / "back" / "model.safetensors", source / "model.safetensors")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
