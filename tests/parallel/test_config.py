"""Model and layout settings that do not fit are refused with the field, the value and the fix."""

from typing import Any

import pytest
from pydantic import ValidationError

from parallel.component_config import DecoderConfig, EmbedderConfig
from parallel.config import ModelConfig, ParallelConfig, check_layout, check_precision
from train.selftest_models import MODELS

STACK = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4}


def model(**changes: Any) -> ModelConfig:
    values = {"vocab_size": 96, "sequence_length": 32, "block_decoder": STACK, "token_decoder": STACK}
    return ModelConfig.model_validate(values | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_decoder": {**STACK, "num_key_value_heads": 3}}, "num_attention_heads=4 .*num_key_value_heads=3"),
        ({"block_decoder": {**STACK, "num_attention_heads": 5}}, "hidden_size=32 .*num_attention_heads=5"),
        ({"backbone": {"rotary_fraction": 0.4}}, "backbone.rotary_fraction=0.4 rotates 3 of 8"),
        ({"embedder": {"table_width": 8}}, "kind=lookup does not take table_width=8"),
        ({"embedder": {"kind": "lookup", "encoder": {}}}, "kind=lookup does not take the section encoder"),
        ({"embedder": {"kind": "roberta", "encoder": {"max_positions": 5}}}, "max_positions=5 .*use at least 6"),
        ({"embedder": {"kind": "roberta_cls", "encoder": {"max_positions": 8}}}, "max_positions=8 .*use at least 9"),
        ({"embedder": {"kind": "roberta", "encoder": {"hidden_size": 30}}}, "hidden_size=30 .*num_attention_heads=8"),
        (
            {"block_length": 8, "block_decoder": {**STACK, "hidden_size": 36}},
            "block_decoder.hidden_size=36 .*projection",
        ),
        ({"block_length": 1, "tie_word_embeddings": True}, "tie_word_embeddings=true has nothing to tie"),
    ],
)
def test_model_settings_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        model(**changes)


@pytest.mark.parametrize(
    ("layout", "precision", "message"),
    [
        ({"zero_stage": 0}, "fp32", "overlap_gradient_reduction=true does nothing with zero_stage=0; use"),
        ({"pipeline": 2}, "fp32", "overlap_gradient_reduction=true does nothing with pipeline=2.*use pipeline=1"),
        ({"zero_stage": 1}, "bf16", "overlap_gradient_reduction=true .*zero_stage=1 in bf16.*use .*zero_stage=2 or 3"),
    ],
)
def test_overlap_where_there_is_none(layout: dict[str, int], precision: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_precision(ParallelConfig(overlap_gradient_reduction=True, **layout), precision)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "layout", "message"),
    [
        ("grouped", {"tensor": 4}, "num_key_value_heads=6 is not a multiple of parallel.tensor=4"),
        ("RoBERTa", {"tensor": 4}, "embedder.encoder.num_attention_heads=2 is not a multiple of parallel.tensor=4"),
        ("Qwen2, tied", {"pipeline": 4}, "parallel.pipeline=4 would part .*use at most 3, or untie"),
        ("vanilla Qwen2, tied", {"pipeline": 2}, "parallel.pipeline=2 would part .*use at most 1, or untie"),
        ("vanilla", {"tensor": 2, "block_parallel": True}, "block_parallel=true .*architecture=vanilla has none"),
        ("Qwen2, tied", {"tensor": 2, "block_parallel": True}, "block_parallel=true .*tie_word_embeddings=true"),
    ],
)
def test_layouts_that_do_not_fit(name: str, layout: dict[str, int], message: str) -> None:
    grouped = {**STACK, "num_attention_heads": 12, "hidden_size": 96, "num_key_value_heads": 6}
    models = {**MODELS, "grouped": model(block_decoder=grouped)}
    with pytest.raises(ValueError, match=message):
        check_layout(models[name], ParallelConfig(**layout))  # type: ignore[arg-type]


def test_undivided_token_decoder_may_have_any_width() -> None:
    config = model(token_decoder={"num_layers": 1, "hidden_size": 33, "num_attention_heads": 3})
    with pytest.raises(ValueError, match="num_attention_heads=3"):
        check_layout(config, ParallelConfig(tensor=2))
    check_layout(config, ParallelConfig(tensor=2, block_parallel=True))


def test_block_parallel_needs_a_group() -> None:
    with pytest.raises(ValueError, match="block_parallel=true needs tensor > 1"):
        ParallelConfig(block_parallel=True)


def test_lengths_follow_the_way_the_context_is_read() -> None:
    """(positions of a block, vectors between layers, vectors of a context embedding), blocks of 4."""
    expected = {"prefix": (6, 6, 3), "summation": (4, 4, 4), "cross_attention": (4, 8, 4)}
    for way, lengths in expected.items():
        config = model(token_decoder_input=way, prefix_length=3)
        assert (config.local_length, config.carried_length, config.num_context_vectors) == lengths


def test_defaults_of_components() -> None:
    assert DecoderConfig(**STACK, num_key_value_heads=2).query_key_value_size == (4 + 2 * 2) * 8
    assert DecoderConfig(**STACK, attention_head_size=16).attention_size == 64
    assert EmbedderConfig(kind="lookup_projection").vector_width(32, 4) == 32
    assert EmbedderConfig(kind="roberta").roberta.stack.feed_forward_size == 1024
    assert EmbedderConfig(kind="roberta_cls").num_vectors(4) == 3
