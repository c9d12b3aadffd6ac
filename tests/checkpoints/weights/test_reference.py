"""Models of the paper's reference code: its recorded logits, and a way back without a changed bit."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from checkpoints.errors import CheckpointError
from checkpoints.weights.piecewise_forward import piecewise_logits
from checkpoints.weights.reference_config import autofilled_heads, model_from_reference
from checkpoints.weights.source_forward import reference_logits
from checkpoints.weights.tensor_files import TensorFiles
from checkpoints.weights.weight_source import open_weight_source
from tests.checkpoints.weights.models import converted, write_trainer_yaml
from tests.golden_reference import BLOCK_VARIANTS, GOLDEN, load_golden, relative_difference

UNUSED = ("block_decoder.gpt_neox.embed_in.weight", "token_decoder.gpt_neox.embed_in.weight")


@pytest.mark.parametrize("name", BLOCK_VARIANTS)
def test_a_recorded_model_computes_the_same_and_returns_unchanged(tmp_path: Path, name: str) -> None:
    golden = load_golden(name)
    config = write_trainer_yaml(tmp_path / "trainer.yaml", golden)
    assert converted(GOLDEN / name, tmp_path / "ours", "ours", config).relative <= 1e-5
    ids, expected = golden.batch("nopad").token_ids, golden.outputs["nopad.logits"]
    with open_weight_source(tmp_path / "ours") as ours:
        assert relative_difference(piecewise_logits(ours.model, ours.read, ids), expected) <= 1e-5
    with TensorFiles(GOLDEN / name) as files:
        assert relative_difference(reference_logits(files, yaml.safe_load(config.read_text()), ids), expected) <= 1e-5
    converted(tmp_path / "ours", tmp_path / "back", "reference")
    before, after = (load_file(folder / "model.safetensors") for folder in (GOLDEN / name, tmp_path / "back"))
    assert before.keys() == after.keys()
    unused = UNUSED if golden.config.block_length == 1 else UNUSED[:1]
    for key, tensor in before.items():
        assert torch.equal(after[key], torch.zeros_like(tensor) if key in unused else tensor), key


def modelling_file(folder: Path) -> ModuleType:
    """The exported file, as somebody without this repository would import it."""
    spec = importlib.util.spec_from_file_location("exported_model", folder / "modeling_block_transformer.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "name", ["main_prefix_b4", "prefix_b1", "lookup_proj_b4", "roberta_prefix_b4", "roberta_cls_sum_b4"]
)
def test_the_modelling_file_computes_and_generates_the_same(tmp_path: Path, name: str) -> None:
    golden = load_golden(name)
    config = write_trainer_yaml(tmp_path / "trainer.yaml", golden)
    converted(GOLDEN / name, tmp_path / "exported", "huggingface", config)
    model = modelling_file(tmp_path / "exported").BlockTransformer.from_pretrained(tmp_path / "exported")
    batch = golden.batch("pad")
    with torch.no_grad():
        logits = model(batch.token_ids, batch.mask)
    expected = golden.outputs["pad.logits"]
    valid = batch.mask.view(2, -1, golden.config.block_length)[:, 1:]
    assert relative_difference(logits[valid], expected[valid]) <= 1e-5
    # Before an encoder the reference fills a prompt up to whole blocks with id 1.
    pad_id = int(golden.config.embedder.has_encoder)
    for prompt in ("p1", "p4", "p7"):
        ids = golden.generation[f"{prompt}.prompt"]
        assert torch.equal(model.generate(ids, 32, pad_id), golden.generation[f"{prompt}.forward_greedy"])


def raw_trainer_config(**changes: Any) -> dict[str, Any]:
    """A trainer YAML as its authors wrote it: heads and inner widths are left out."""
    stack = {"cls": "gpt-neo-x", "config": {"num_hidden_layers": 6, "hidden_size": 768}}
    content: dict[str, Any] = {
        "max_length": 1024,
        "block_split": {"distribution": "fixed", "distribution_kwargs": {"length": 4}},
        "embedder": {"cls": "lookup", "n_embedding_tokens": 1, "config": {"hidden_size": 192}},
        "block_decoder": stack,
        "token_decoder": stack | {"decoding_strategy": "prefix", "expansion_ratio": 2},
    }
    for path, value in changes.items():
        *parents, last = path.split("__")
        section = content
        for parent in parents:
            section[parent] = dict(section[parent])
            section = section[parent]
        section[last] = value
    return content


def test_what_the_authors_left_out_is_filled_in_as_their_code_does() -> None:
    assert [autofilled_heads(width) for width in (128, 256, 512, 768, 1024, 2048)] == [4, 8, 8, 12, 16, 16]
    model = model_from_reference(raw_trainer_config(), vocab_size=50304)
    assert (model.blocks.num_attention_heads, model.blocks.feed_forward_size) == (12, 3072)
    assert (model.block_length, model.prefix_length, model.sequence_length) == (4, 2, 1024)
    small = {"num_hidden_layers": 3, "hidden_size": 256}
    encoder = raw_trainer_config(embedder__cls="roberta_cls", embedder__n_cls_tokens=3, embedder__config=small)
    roberta = model_from_reference(encoder, vocab_size=50304).embedder.roberta
    assert (roberta.num_attention_heads, roberta.max_positions) == (8, 514)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_decoder__cls": "t5"}, "T5 token decoder"),
        ({"token_decoder__decoding_strategy": "cross_attention"}, "T5 token decoder"),
        ({"embedder__cls": "t5"}, "embedder.cls='t5'; supported is lookup, roberta or roberta_cls"),
        ({"embedder__n_embedding_tokens": 2}, "embedder.n_embedding_tokens=2; supported is 1"),
        ({"block_split__distribution": "uniform"}, "block_split.distribution='uniform'; supported is fixed"),
        ({"block_decoder__config__hidden_size": None}, "block_decoder.config.hidden_size=None"),
        ({"block_decoder__config__hidden_act": "relu"}, "different values are not supported"),
        ({"embedder__config__hidden_size": 100}, "embedder.config.hidden_size=100; supported is 192"),
        ({"block_decoder__config__new_field": 1}, "block_decoder.config.new_field=1; supported is left out"),
        ({"token_decoder__config__num_attention_heads": 7}, "not a multiple of num_attention_heads=7"),
    ],
)
def test_what_our_model_is_not_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        model_from_reference(raw_trainer_config(**changes), vocab_size=50304)
