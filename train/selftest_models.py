"""Small models for the parity matrix: the paper's two architectures and every variant of them."""

from typing import Any

from parallel.component_config import BackboneConfig, DecoderConfig, EmbedderConfig, EncoderConfig
from parallel.config import ModelConfig

LLAMA = BackboneConfig(
    norm="rms_norm", residual="sequential", feed_forward="swiglu", bias="none", rotary_fraction=1.0, rotary_base=5e5
)
QWEN2 = LLAMA.model_copy(update={"bias": "query_key_value"})
QWEN3 = LLAMA.model_copy(update={"query_key_norm": True})
ENCODER = EncoderConfig(num_layers=2, hidden_size=16, num_attention_heads=2, max_positions=16)


def _stack(layers: int = 2, width: int = 32, heads: int = 4, **options: Any) -> DecoderConfig:
    return DecoderConfig(num_layers=layers, hidden_size=width, num_attention_heads=heads, **options)


def _block(**settings: Any) -> ModelConfig:
    """A Block Transformer whose 7 target blocks per sequence divide by nothing but 7."""
    length = settings.get("block_length", 4)
    defaults = {
        "vocab_size": 96,
        "sequence_length": 8 * length,
        "block_decoder": _stack(),
        "token_decoder": _stack(),
    }
    return ModelConfig.model_validate(defaults | settings)


def _vanilla(**settings: Any) -> ModelConfig:
    defaults = {"architecture": "vanilla", "vocab_size": 96, "sequence_length": 32, "decoder": _stack()}
    return ModelConfig.model_validate(defaults | settings)


GROUPED = _stack(num_key_value_heads=2)
LOOKUP_PROJECTION = EmbedderConfig(kind="lookup_projection", table_width=12)

MODELS: dict[str, ModelConfig] = {
    "block": _block(),
    "vanilla": _vanilla(),
    "lookup with projection": _block(embedder=LOOKUP_PROJECTION),
    "RoBERTa": _block(embedder=EmbedderConfig(kind="roberta", encoder=ENCODER), prefix_length=1),
    "RoBERTa CLS, summation": _block(
        embedder=EmbedderConfig(kind="roberta_cls", encoder=ENCODER), token_decoder_input="summation"
    ),
    "MEGABYTE": _block(token_decoder_input="summation", block_decoder=_stack(3, 48, 6), token_decoder=_stack(1, 16, 2)),
    "cross-attention": _block(token_decoder_input="cross_attention", token_decoder=_stack(2, 16, 2)),
    "Llama, cross-attention": _block(
        token_decoder_input="cross_attention", backbone=LLAMA, block_decoder=GROUPED, token_decoder=GROUPED
    ),
    "Llama": _block(backbone=LLAMA, block_decoder=GROUPED, token_decoder=GROUPED, embedder=LOOKUP_PROJECTION),
    "Qwen2, tied": _block(backbone=QWEN2, block_decoder=GROUPED, token_decoder=GROUPED, tie_word_embeddings=True),
    "Qwen3": _block(backbone=QWEN3, block_decoder=_stack(attention_head_size=12), token_decoder=GROUPED),
    "one token per block": _block(block_length=1, prefix_length=1, sequence_length=24),
    "blocks of eight": _block(block_length=8, prefix_length=4),
    "vanilla Llama": _vanilla(backbone=LLAMA, decoder=GROUPED),
    "vanilla, multi-query": _vanilla(decoder=_stack(num_key_value_heads=1)),
    "cross-attention, multi-query": _block(
        token_decoder_input="cross_attention", token_decoder=_stack(num_key_value_heads=1)
    ),
    "vanilla Qwen2, tied": _vanilla(backbone=QWEN2, decoder=GROUPED, tie_word_embeddings=True),
}
UNPIPELINED = ("vanilla Qwen2, tied",)  # first and last piece share a table
VARIANTS = [name for name in MODELS if name not in ("block", "vanilla")]
# What sequence parallelism treats in its own way: rows of blocks, projections, shared tables and heads.
SEQUENCE_PARALLEL = ("Llama", "RoBERTa CLS, summation", "cross-attention, multi-query", "Qwen2, tied", "Qwen3")
