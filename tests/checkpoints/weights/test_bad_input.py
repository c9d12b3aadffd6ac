"""What cannot be converted: one sentence that names both sides, and nothing left behind."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints.errors import CheckpointError
from checkpoints.weights.weight_source import open_weight_source
from tests.checkpoints.weights.models import converted, edit_json, save_transformers, transformers_model

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_transformers(tmp_path_factory.mktemp("llama"), "Llama", num_key_value_heads=2)


@pytest.fixture(scope="module")
def neox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_transformers(tmp_path_factory.mktemp("neox"), "GPTNeoX")


def changed(source: Path, folder: Path, config: dict[str, Any], tensors: dict[str, Any] | None = None) -> Path:
    """A copy of a folder with other configuration fields and tensors; None removes one."""
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    edit_json(folder / "config.json", **config)
    merged = load_file(source / WEIGHTS) | (tensors or {})
    save_file({name: tensor for name, tensor in merged.items() if tensor is not None}, folder / WEIGHTS)
    return folder


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bloom"}, "model_type='bloom', which is not one of gpt_neox, llama, mistral, qwen2, qwen3"),
        ({"hidden_act": "gelu_new"}, "hidden_act='gelu_new'; for llama only 'silu'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_parameters of type 'llama3'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling of type 'linear'"),
        ({"attention_bias": True}, "attention_bias=true; only llama with both"),
        ({"mlp_bias": True}, "mlp_bias=true; only llama with both"),
        ({"hidden_size": "many"}, "hidden_size='many'; it must be a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads=0; it must be a whole number above 0"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads='2'; it must be a whole number"),
        ({"head_dim": 8.5}, r"head_dim=8\.5; it must be a whole number"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps='1e-6'; it must be a number"),
        ({"rms_norm_eps": 0}, "norm_epsilon=0.0: Input should be greater than 0"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_theta='x'; it must be a number"),
        ({"rope_parameters": [1]}, r"rope_parameters=\[1\]; it must be an object"),
        ({"rope_scaling": "dynamic"}, "rope_scaling='dynamic'; it must be an object"),
        ({"model_type": "mistral", "sliding_window": "4096"}, "sliding_window='4096'; it must be a whole number"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        (
            {"num_key_value_heads": 4},
            r"k_proj.weight with shape \[16, 32\], but vanilla.layers.0.attention.query_key_value.weight of our model "
            r"\[96, 32\] needs \[32, 32\]",
        ),
        ({"num_attention_heads": 8, "head_dim": 8}, r"q_proj.weight with shape \[32, 32\].* needs \[64, 32\]"),
        (
            {"vocab_size": 100},
            r"embed_tokens.weight with shape \[96, 32\].*vanilla.input.embedding.*\[100, 32\]",
        ),
        ({"num_hidden_layers": 3}, "holds no tensor model.layers.2.input_layernorm.weight, which vanilla.layers.2"),
        ({"num_hidden_layers": 1}, "holds the tensor model.layers.1.* which no parameter of our model is made from"),
    ],
)
def test_a_configuration_that_does_not_fit(tmp_path: Path, llama: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_weight_source(changed(llama, tmp_path / "source", config))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_act": "gelu_fast"}, "hidden_act='gelu_fast'; for gpt_neox only 'gelu'"),
        ({"attention_bias": False}, "attention_bias=false"),
    ],
)
def test_a_gpt_neox_that_is_not_ours(tmp_path: Path, neox: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_weight_source(changed(neox, tmp_path / "source", config))


def test_a_sliding_window_must_hold_a_sequence(tmp_path: Path, llama: Path) -> None:
    mistral = changed(llama, tmp_path / "source", {"model_type": "mistral", "sliding_window": 16})
    with pytest.raises(CheckpointError, match="sliding_window=16, which is shorter than sequences of 64 tokens"):
        open_weight_source(mistral)
    with open_weight_source(mistral, sequence_length=16) as source:
        assert source.model.sequence_length == 16


def test_tensors_that_do_not_fit(tmp_path: Path, llama: Path) -> None:
    name = "model.norm.weight"
    with pytest.raises(CheckpointError, match=f"holds no tensor {name}, which vanilla.output.norm.weight of our model"):
        open_weight_source(changed(llama, tmp_path / "missing", {}, {name: None}))
    with pytest.raises(CheckpointError, match=r"holds the tensor score.weight \[3\], which no parameter of our model"):
        open_weight_source(changed(llama, tmp_path / "extra", {}, {"score.weight": torch.ones(3)}))
    with (
        open_weight_source(changed(llama, tmp_path / "type", {}, {name: torch.ones(32).long()})) as source,
        pytest.raises(CheckpointError, match=rf"{WEIGHTS} holds {name} as I64, which is not supported"),
    ):
        source.read("vanilla.output.norm.weight")


def test_weights_that_are_no_numbers(tmp_path: Path, llama: Path) -> None:
    damaged = changed(llama, tmp_path / "source", {}, {"model.norm.weight": torch.full((32,), torch.nan)})
    with pytest.raises(CheckpointError, match=r"source computes logits that are no numbers.*nothing was kept"):
        converted(damaged, tmp_path / "output", "ours")
    assert not (tmp_path / "output").exists()


def test_folders_without_readable_weights(tmp_path: Path, llama: Path) -> None:
    with pytest.raises(CheckpointError, match="missing is not a folder"):
        open_weight_source(tmp_path / "missing")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_bytes((llama / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"holds neither model.safetensors nor"):
        open_weight_source(pickled)
    torch.save({"x": torch.ones(1)}, pickled / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin, a pickle.*convert it with safetensors"):
        open_weight_source(pickled)
    (pickled / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin, a pickle"):
        open_weight_source(pickled)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / WEIGHTS).write_bytes((llama / WEIGHTS).read_bytes())
    with pytest.raises(CheckpointError, match=r"holds weights but no config.json; .* with --config"):
        open_weight_source(bare)
    (bare / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json cannot be read as JSON"):
        open_weight_source(bare)
    other = tmp_path / "other.yaml"
    other.write_text("train: {}")
    with pytest.raises(CheckpointError, match=r"other.yaml is no trainer configuration of the reference code"):
        open_weight_source(bare, other)


@pytest.mark.parametrize("kept", [4, 200, -8])
def test_a_truncated_file(tmp_path: Path, llama: Path, kept: int) -> None:
    source = changed(llama, tmp_path / "source", {})
    (source / WEIGHTS).write_bytes((source / WEIGHTS).read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS} cannot be read .*; it may be cut short: fetch it again"):
        open_weight_source(source)


def test_a_broken_index(tmp_path: Path) -> None:
    transformers_model("Llama").save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first = content["weight_map"]["model.norm.weight"]
    (tmp_path / first).rename(tmp_path / "aside")
    with pytest.raises(CheckpointError, match=f"names {first}, which is missing"):
        open_weight_source(tmp_path)
    (tmp_path / "aside").rename(tmp_path / first)
    content["weight_map"]["model.norm.weight"] = next(name for name in content["weight_map"].values() if name != first)
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"places model.norm.weight in .*, which does not hold it"):
        open_weight_source(tmp_path)
    content["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"elsewhere.safetensors, which is not a file beside it"):
        open_weight_source(tmp_path)
    content["weight_map"]["model.norm.weight"] = 7
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"names 7, which is not a file beside it"):
        open_weight_source(tmp_path)
    index.write_text("[]")
    with pytest.raises(CheckpointError, match="is no index of safetensors files"):
        open_weight_source(tmp_path)


def test_a_folder_of_weights_may_hold_other_folders(tmp_path: Path, llama: Path) -> None:
    source = changed(llama, tmp_path / "source", {})
    (source / "checkpoints").mkdir()
    with open_weight_source(source) as opened:
        assert opened.details["family"] == "llama"


def test_an_output_that_exists_or_fails_is_left_as_it_was(tmp_path: Path, llama: Path) -> None:
    (tmp_path / "output").mkdir()
    with pytest.raises(CheckpointError, match="output exists; name a new folder"):
        converted(llama, tmp_path / "output", "ours")
    with pytest.raises(CheckpointError, match="the reference code has no model with architecture=vanilla"):
        converted(llama, tmp_path / "reference", "reference")
    with pytest.raises(CheckpointError, match="--dtype does not go with --to ours"):
        converted(llama, tmp_path / "ours", "ours", dtype=torch.float16)
    # float16 has no numbers this large.
    huge = changed(llama, tmp_path / "huge", {}, {"model.norm.weight": torch.full((32,), 1e6)})
    with pytest.raises(CheckpointError, match=r"are no numbers.*too large for --dtype; nothing was kept"):
        converted(huge, tmp_path / "narrow", "huggingface", dtype=torch.float16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["huge", "output"]
