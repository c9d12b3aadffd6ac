"""Names and global shapes of all parameters of a model, from its settings alone; needs no process group."""

from collections.abc import Iterator

from parallel.component_config import DecoderConfig, EncoderConfig
from parallel.config import ModelConfig

Shape = tuple[int, ...]
Named = tuple[str, Shape]


def parameter_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Global parameter names with their shapes, in the order of the model's pieces."""
    return dict(_block(model) if model.is_block else _vanilla(model))


def _block(model: ModelConfig) -> Iterator[Named]:
    blocks, tokens = model.blocks, model.tokens
    yield from _embedder(model)
    for index in range(blocks.num_layers):
        yield from _decoder_layer(f"block_decoder.layers.{index}", blocks, model)
    yield from _norm("block_decoder.output.norm", blocks.hidden_size, model)
    width = tokens.hidden_size
    yield from _linear("token_decoder.input.expansion", model.num_context_vectors * width, blocks.hidden_size, True)
    if model.embeds_local_tokens:
        yield "token_decoder.input.embedding.weight", (model.vocab_size, width)
    for index in range(tokens.num_layers):
        yield from _decoder_layer(f"token_decoder.layers.{index}", tokens, model)
        if model.has_cross_attention:
            yield from _cross_attention(f"token_decoder.layers.{index}", tokens, model)
    yield from _output("token_decoder.output", width, model)


def _vanilla(model: ModelConfig) -> Iterator[Named]:
    stack = model.vanilla
    yield "vanilla.input.embedding.weight", (model.vocab_size, stack.hidden_size)
    for index in range(stack.num_layers):
        yield from _decoder_layer(f"vanilla.layers.{index}", stack, model)
    yield from _output("vanilla.output", stack.hidden_size, model)


def _embedder(model: ModelConfig) -> Iterator[Named]:
    embedder, length, width = model.embedder, model.block_length, model.blocks.hidden_size
    vector = embedder.vector_width(width, length)
    if embedder.has_encoder:
        yield from _encoder("embedder.encoder", model.vocab_size, embedder.roberta)
    else:
        yield "embedder.embedding.weight", (model.vocab_size, vector)
    if embedder.has_projection:
        yield from _linear("embedder.projection", width, embedder.num_vectors(length) * vector, True)


def _encoder(name: str, vocab_size: int, encoder: EncoderConfig) -> Iterator[Named]:
    width, inner = encoder.hidden_size, encoder.stack.feed_forward_size
    yield f"{name}.word_embedding.weight", (vocab_size, width)
    yield f"{name}.position_embedding.weight", (encoder.max_positions, width)
    yield f"{name}.token_type_embedding.weight", (1, width)
    yield from _vectors(f"{name}.norm", width, True)
    for index in range(encoder.num_layers):
        layer = f"{name}.layers.{index}"
        yield from _linear(f"{layer}.attention.query_key_value", 3 * width, width, True)
        yield from _linear(f"{layer}.attention.dense", width, width, True)
        yield from _vectors(f"{layer}.attention_norm", width, True)
        yield from _linear(f"{layer}.feed_forward.expand", inner, width, True)
        yield from _linear(f"{layer}.feed_forward.contract", width, inner, True)
        yield from _vectors(f"{layer}.feed_forward_norm", width, True)


def _decoder_layer(name: str, stack: DecoderConfig, model: ModelConfig) -> Iterator[Named]:
    backbone, width, inner = model.backbone, stack.hidden_size, stack.feed_forward_size
    everywhere = backbone.bias == "all"
    yield from _norm(f"{name}.attention_norm", width, model)
    yield from _linear(f"{name}.attention.query_key_value", stack.query_key_value_size, width, backbone.bias != "none")
    if backbone.query_key_norm:
        yield f"{name}.attention.query_norm.weight", (stack.head_size,)
        yield f"{name}.attention.key_norm.weight", (stack.head_size,)
    yield from _linear(f"{name}.attention.dense", width, stack.attention_size, everywhere)
    yield from _norm(f"{name}.feed_forward_norm", width, model)
    if backbone.feed_forward == "swiglu":
        yield from _linear(f"{name}.feed_forward.gate", inner, width, everywhere)
    yield from _linear(f"{name}.feed_forward.expand", inner, width, everywhere)
    yield from _linear(f"{name}.feed_forward.contract", width, inner, everywhere)


def _cross_attention(name: str, stack: DecoderConfig, model: ModelConfig) -> Iterator[Named]:
    width, bias = stack.hidden_size, model.backbone.bias
    yield from _norm(f"{name}.cross_attention_norm", width, model)
    yield from _linear(f"{name}.cross_attention.query", stack.attention_size, width, bias != "none")
    pairs = 2 * stack.key_value_heads * stack.head_size
    yield from _linear(f"{name}.cross_attention.key_value", pairs, width, bias != "none")
    yield from _linear(f"{name}.cross_attention.dense", width, stack.attention_size, bias == "all")


def _output(name: str, width: int, model: ModelConfig) -> Iterator[Named]:
    yield from _norm(f"{name}.norm", width, model)
    if not model.tie_word_embeddings:
        yield f"{name}.head.weight", (model.vocab_size, width)


def _linear(name: str, outputs: int, inputs: int, bias: bool) -> Iterator[Named]:
    yield f"{name}.weight", (outputs, inputs)
    if bias:
        yield f"{name}.bias", (outputs,)


def _norm(name: str, width: int, model: ModelConfig) -> Iterator[Named]:
    yield from _vectors(name, width, model.backbone.norm == "layer_norm")


def _vectors(name: str, width: int, bias: bool) -> Iterator[Named]:
    yield f"{name}.weight", (width,)
    if bias:
        yield f"{name}.bias", (width,)
