"""Models that transformers built: imported, computed alike, and exported again without a changed bit."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from checkpoints.trained_model import find_trained_model
from checkpoints.weights.piecewise_forward import piecewise_logits
from checkpoints.weights.weight_source import open_vanilla_source, open_weight_source
from parallel.inputs import MicroBatch
from tests.checkpoints.weights.models import (
    FAMILY_CASES,
    converted,
    edit_json,
    random_tokens,
    same_tensors,
    save_transformers,
    transformers_model,
)
from tests.golden_reference import relative_difference

WEIGHTS = "model.safetensors"


@pytest.mark.parametrize("case", FAMILY_CASES)
def test_a_family_computes_as_in_transformers_and_returns_unchanged(tmp_path: Path, case: str) -> None:
    kind, options = FAMILY_CASES[case]
    source, ours, back = (tmp_path / name for name in ("source", "ours", "back"))
    save_transformers(source, kind, **options)
    assert converted(source, ours, "ours").relative <= 1e-5
    ids = random_tokens()
    with torch.no_grad():
        expected = transformers_model(kind, **options)(ids).logits
    with open_weight_source(ours) as opened:
        actual = piecewise_logits(opened.model, opened.read, ids)
    assert relative_difference(actual, expected) <= 1e-5
    assert converted(ours, back, "huggingface").relative <= 1e-5
    assert (back / WEIGHTS).read_bytes() == (source / WEIGHTS).read_bytes()
    again = transformers.AutoModelForCausalLM.from_pretrained(back)
    assert type(again).__name__ == f"{kind}ForCausalLM"
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, expected)


def test_the_whole_imported_model_computes_the_same(tmp_path: Path) -> None:
    save_transformers(tmp_path / "source", "Llama", num_key_value_heads=2)
    converted(tmp_path / "source", tmp_path / "ours", "ours")
    ids = random_tokens()
    stage = find_trained_model(tmp_path / "ours").load()
    with torch.no_grad():
        expected = transformers_model("Llama", num_key_value_heads=2)(ids).logits
        actual = stage.logits(MicroBatch(ids, torch.ones_like(ids, dtype=torch.bool)))
    assert relative_difference(actual.transpose(0, 1), expected) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_shards_return_unchanged(tmp_path: Path, dtype: torch.dtype) -> None:
    model = transformers_model("Qwen2", num_key_value_heads=2).to(dtype)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert not (tmp_path / "shards" / WEIGHTS).exists()
    converted(tmp_path / "shards", tmp_path / "ours", "ours", maximum_file_bytes=30_000)
    files = sorted(path.name for path in (tmp_path / "ours" / "checkpoints" / "step_00000000").iterdir())
    assert files[:3] == ["manifest.json", "weights_00001.safetensors", "weights_00002.safetensors"]
    converted(tmp_path / "ours", tmp_path / "back", "huggingface")
    assert same_tensors(tmp_path / "whole" / WEIGHTS, tmp_path / "back" / WEIGHTS)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix(
        "torch."
    )
    converted(tmp_path / "ours", tmp_path / "sharded", "huggingface", maximum_file_bytes=30_000)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sharded", dtype=dtype)
    expected = load_file(tmp_path / "whole" / WEIGHTS)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())


def test_types_may_differ_between_tensors_and_can_be_changed(tmp_path: Path) -> None:
    source = save_transformers(tmp_path / "source", "GPTNeoX", torch.bfloat16)
    tensors = load_file(source / WEIGHTS)
    tensors["gpt_neox.final_layer_norm.weight"] = tensors["gpt_neox.final_layer_norm.weight"].float() + 1e-4
    save_file(tensors, source / WEIGHTS, metadata={"format": "pt"})
    converted(source, tmp_path / "ours", "ours")
    converted(tmp_path / "ours", tmp_path / "back", "huggingface")
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (source / WEIGHTS).read_bytes()
    converted(tmp_path / "ours", tmp_path / "narrow", "huggingface", dtype=torch.float16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "narrow" / WEIGHTS).values()} == {torch.float16}


def test_the_older_layout_of_the_configuration_is_read(tmp_path: Path) -> None:
    neox = save_transformers(tmp_path / "neox", "GPTNeoX")
    edit_json(neox / "config.json", rope_parameters=None, rotary_pct=0.5, rotary_emb_base=20000)
    with open_vanilla_source(neox) as source:
        backbone = source.model.backbone
    assert (backbone.rotary_fraction, backbone.rotary_base) == (0.5, 20000.0)
    llama = save_transformers(tmp_path / "llama", "Llama")
    edit_json(llama / "config.json", rope_parameters=None, rope_theta=500000.0, head_dim=None)
    with open_vanilla_source(llama) as source:
        backbone = source.model.backbone
    assert (backbone.rotary_fraction, backbone.rotary_base) == (1.0, 500000.0)


def test_known_buffers_are_ignored(tmp_path: Path) -> None:
    source = save_transformers(tmp_path / "source", "GPTNeoX")
    tensors = load_file(source / WEIGHTS)
    tensors["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = torch.ones(2)
    tensors["gpt_neox.layers.1.attention.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    tensors["gpt_neox.layers.1.attention.masked_bias"] = torch.tensor(-1e9)
    save_file(tensors, source / WEIGHTS, metadata={"format": "pt"})
    converted(source, tmp_path / "ours", "ours")


def test_a_vanilla_source_is_the_same_from_either_format(tmp_path: Path) -> None:
    source = save_transformers(tmp_path / "source", "Qwen3", num_key_value_heads=2)
    converted(source, tmp_path / "ours", "ours")
    with open_vanilla_source(source) as theirs, open_vanilla_source(tmp_path / "ours") as ours:
        assert theirs.model == ours.model
        assert theirs.names == ours.names
        assert all(torch.equal(theirs.read(name), ours.read(name)) for name in ours.names)
        assert "qwen3 model" in theirs.description
        assert ours.description == f"checkpoint {tmp_path}/ours/checkpoints/step_00000000"
