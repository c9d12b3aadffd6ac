"""Attention maps against the layers' own outputs and a plain average."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from evaluation.documents import DocumentChunks
from evaluation.probes.attention import probe_attention
from parallel.attention import CrossAttention, SelfAttention
from parallel.inputs import MicroBatch
from parallel.stage import Stage
from tests.evaluation.text import VOCABULARY, small_stage

PNG = b"\x89PNG\r\n\x1a\n"
KINDS = [("prefix", 4), ("prefix", 1), ("summation", 4), ("cross_attention", 4), ("vanilla", 1)]


def some_chunks(count: int = 5, length: int = 48) -> DocumentChunks:
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (count, length), dtype=np.int32)
    return DocumentChunks(ids, documents=1, too_short=0, available=count, left_over=0)


def captured(
    stage: Stage, ids: np.ndarray
) -> dict[str, tuple[SelfAttention | CrossAttention, tuple[Tensor, ...], Tensor]]:
    """Layer, inputs and output of every attention in one forward pass."""
    seen = {}
    handles = [
        module.register_forward_hook(
            lambda module, inputs, output, name=name: seen.update({name: (module, inputs, output)})
        )
        for name, module in stage.named_modules()
        if isinstance(module, SelfAttention | CrossAttention)
    ]
    tokens = torch.from_numpy(ids.astype(np.int64))
    with torch.no_grad():
        stage(MicroBatch(tokens, torch.ones_like(tokens, dtype=torch.bool)))
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(("kind", "length"), KINDS)
def test_weights_reproduce_the_layers_output(kind: str, length: int) -> None:
    stage = small_stage(kind, length)
    for name, (attention, inputs, output) in captured(stage, some_chunks().token_ids).items():
        with torch.no_grad():
            weights = attention.weights(*inputs)
            if isinstance(attention, SelfAttention):
                value = attention._heads(attention.query_key_value(inputs[0])[0])[2]
            else:
                value = attention._heads(*inputs)[2]
            assert torch.allclose(weights.sum(dim=-1), torch.ones(1)), name
            heads = weights @ value.repeat_interleave(weights.shape[1] // value.shape[1], dim=1)
            order = (2, 0, 1, 3) if getattr(attention, "sequence_first", False) else (0, 2, 1, 3)
            again = attention.dense(heads.permute(*order).flatten(2))[0]
        assert torch.allclose(again, output, atol=1e-5), name


def test_weights_heed_a_mask() -> None:
    attention = small_stage().get_submodule("block_decoder.layers.0.attention")
    assert isinstance(attention, SelfAttention)
    hidden = torch.randn(6, 2, 32, generator=torch.Generator().manual_seed(0))
    mask = (torch.ones(6, 6, dtype=torch.bool).tril() & torch.tensor([0, 1, 1, 0, 1, 1]).bool()) | torch.eye(6).bool()
    with torch.no_grad():
        weights = attention.weights(hidden, mask)
    assert bool((weights[..., ~mask] == 0).all())
    assert bool((weights[..., mask] > 0).all())


@pytest.mark.parametrize(("kind", "length"), KINDS)
def test_the_probe_averages_over_text(tmp_path: Path, kind: str, length: int) -> None:
    stage = small_stage(kind, length)
    chunks = some_chunks()
    result = probe_attention(stage, chunks, batch_tokens=2 * 48)  # batches of 2, 2 and 1
    stack = "vanilla" if kind == "vanilla" else "block_decoder"
    everything = captured(stage, chunks.token_ids)
    units = 48 // length
    for index, layer in enumerate(result.everywhere):
        attention, inputs, _ = everything[f"{stack}.layers.{index}.attention"]
        with torch.no_grad():
            weights = attention.weights(*inputs).numpy()  # [B, heads, N, N]
        assert layer.first_by_head == pytest.approx(weights[:, :, 1:, 0].mean(axis=(0, 2)), abs=1e-6)
        corner = min(32, units)
        assert np.allclose(layer.corner, weights.mean(axis=(0, 1))[:corner, :corner], atol=1e-6)
        for back in (0, 1, units - 2):
            pairs = [weights[:, :, place, place - back] for place in range(back + 1, units)]
            assert layer.by_distance[back] == pytest.approx(np.mean(pairs), abs=1e-6)
        assert layer.first + sum(layer.shares([0, 1, units - 1])) == pytest.approx(1.0, abs=1e-5)
    assert len(result.local) == (0 if kind == "vanilla" else 2)
    for index, local in enumerate(result.local):
        for name, found in (("attention", local.positions), ("cross_attention", local.context)):
            if found is not None:
                attention, inputs, _ = everything[f"token_decoder.layers.{index}.{name}"]
                with torch.no_grad():
                    weights = attention.weights(*inputs)[: -len(chunks)].mean(dim=(0, 1))
                assert np.allclose(found, weights, atol=1e-6)
    assert (result.local[0].context is not None if result.local else False) == (kind == "cross_attention")
    json.dumps(result.to_json(), allow_nan=False)
    assert len(result.lines()) >= 4
    assert not any(module._forward_pre_hooks for module in stage.modules()), "the model is as it was"
    if kind in ("cross_attention", "vanilla"):
        paths = result.draw(tmp_path)
        assert all(path.read_bytes().startswith(PNG) for path in paths)
        assert len(paths) == (3 if kind == "vanilla" else 5)


def test_shares_of_the_prefix_and_uniform_values() -> None:
    stage = small_stage()
    with torch.no_grad():  # all products of queries and keys are 0, so that attention is uniform
        for name, parameter in stage.named_parameters():
            if "query_key_value" in name:
                parameter.zero_()
    result = probe_attention(stage, some_chunks(), batch_tokens=96)
    assert [layer.first for layer in result.everywhere] == pytest.approx([result.uniform_first] * 2)
    assert result.prefix_shares == pytest.approx([result.uniform_prefix] * 2)
    assert result.uniform_prefix == pytest.approx(np.mean([2 / 3, 2 / 4, 2 / 5]))
    assert result.leading_names == ("prefix 1", "prefix 2")
