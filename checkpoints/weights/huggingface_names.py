"""Which tensors of Hugging Face models are which of our parameters."""

from collections.abc import Iterator

from checkpoints.weights.huggingface_config import GPT_NEOX
from checkpoints.weights.parameter_shapes import parameter_shapes
from checkpoints.weights.weight_mapping import Rule, fused_heads, same
from parallel.component_config import DecoderConfig
from parallel.config import ModelConfig

NEOX_LAYER = {
    "attention_norm": "input_layernorm",
    "attention.query_key_value": "attention.query_key_value",
    "attention.dense": "attention.dense",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.expand": "mlp.dense_h_to_4h",
    "feed_forward.contract": "mlp.dense_4h_to_h",
}
_LLAMA_LAYER = {
    "attention_norm": "input_layernorm",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "attention.dense": "self_attn.o_proj",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.expand": "mlp.up_proj",
    "feed_forward.contract": "mlp.down_proj",
}
_NEOX_ENDS = {
    "vanilla.input.embedding": "gpt_neox.embed_in",
    "vanilla.output.norm": "gpt_neox.final_layer_norm",
    "vanilla.output.head": "embed_out",
}
_LLAMA_ENDS = {
    "vanilla.input.embedding": "model.embed_tokens",
    "vanilla.output.norm": "model.norm",
    "vanilla.output.head": "lm_head",
}
_BUFFERS = {
    GPT_NEOX: (r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
    "llama": (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"model\.rotary_emb\.inv_freq"),
}


def huggingface_rules(model: ModelConfig, family: str) -> list[Rule]:
    """The rules of a vanilla model in a family of FAMILIES, in the order of our parameters."""
    neox = family == GPT_NEOX
    return [
        _neox_rule(name, shape) if neox else _llama_rule(name, shape, model.vanilla)
        for name, shape in parameter_shapes(model).items()
    ]


def ignored_tensors(model: ModelConfig, family: str) -> Iterator[str]:
    """Patterns of tensors that a folder may hold although the model does not need them."""
    yield from _BUFFERS.get(family, _BUFFERS["llama"])
    if model.tie_word_embeddings:
        yield r"embed_out\.weight" if family == GPT_NEOX else r"lm_head\.weight"


def split_layer(name: str) -> tuple[str, str, str]:
    """Owner, index and rest of a layer's parameter: a.layers.3.b.weight -> (a, 3, b.weight)."""
    owner, _, rest = name.partition(".layers.")
    index, _, inner = rest.partition(".")
    return owner, index, inner


def _neox_rule(name: str, shape: tuple[int, ...]) -> Rule:
    stem, _, kind = name.rpartition(".")
    if stem in _NEOX_ENDS:
        return same(name, f"{_NEOX_ENDS[stem]}.{kind}", shape)
    _, index, inner = split_layer(stem)
    return same(name, f"gpt_neox.layers.{index}.{NEOX_LAYER[inner]}.{kind}", shape)


def _llama_rule(name: str, shape: tuple[int, ...], stack: DecoderConfig) -> Rule:
    stem, _, kind = name.rpartition(".")
    if stem in _LLAMA_ENDS:
        return same(name, f"{_LLAMA_ENDS[stem]}.{kind}", shape)
    _, index, inner = split_layer(stem)
    layer = f"model.layers.{index}"
    if inner != "attention.query_key_value":
        return same(name, f"{layer}.{_LLAMA_LAYER[inner]}.{kind}", shape)
    size = stack.head_size
    theirs = tuple(f"{layer}.self_attn.{letter}_proj.{kind}" for letter in "qkv")
    return fused_heads(name, theirs, shape, stack.key_value_heads, (stack.queries_per_group * size, size, size))
