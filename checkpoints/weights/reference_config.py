"""Trainer YAML of the paper's reference code <-> our model settings.

Reads the YAML as its authors wrote it (heads and inner widths left out) and as their code fills it in.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from checkpoints.errors import CheckpointError
from parallel.component_config import BackboneConfig, DecoderConfig, EmbedderConfig, EncoderConfig
from parallel.config import ModelConfig

NEOX = "gpt-neo-x"
ENCODERS = ("roberta", "roberta_cls")
DEFAULT_SEQUENCE_LENGTH = 2048
POSITION_ROWS = 514  # roberta-base
HARMLESS_FIELDS = frozenset(
    {"vocab_size", "max_position_embeddings", "attention_dropout", "hidden_dropout", "classifier_dropout"}
    | {"hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "use_cache", "torch_dtype"}
    | {"bos_token_id", "eos_token_id", "pad_token_id", "type_vocab_size", "is_decoder", "model_type"}
    | {"_attn_implementation", "attn_implementation", "rope_scaling"}
)
STACK_FIELDS = frozenset({"num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size"})
# Fields of the GPT-NeoX configuration that both decoders share in our model, with their defaults.
BACKBONE_FIELDS = {
    "layer_norm_eps": 1e-5,
    "use_parallel_residual": True,
    "rotary_pct": 0.25,
    "rotary_emb_base": 10000,
    "hidden_act": "gelu",
    "attention_bias": True,
    "tie_word_embeddings": False,
}
# The rest of the model is defined by these; other values would be another model.
FIXED_FIELDS = {"hidden_act": "gelu", "attention_bias": True, "tie_word_embeddings": False, "rope_scaling": None}


def read_reference_config(path: Path) -> dict[str, Any]:
    """Contents of a trainer YAML.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path} cannot be read as YAML: {error}") from None
    if not isinstance(content, dict) or not {"embedder", "block_decoder", "token_decoder"} <= content.keys():
        raise CheckpointError(
            f"{path} is no trainer configuration of the reference code for a Block Transformer: it needs the sections "
            "embedder, block_decoder and token_decoder"
        )
    return content


def model_from_reference(config: Mapping[str, Any], vocab_size: int, sequence_length: int | None = None) -> ModelConfig:
    """Our settings of a model of the reference code.

    Args:
        config: contents of the trainer YAML.
        vocab_size: rows of the tables in its weights; the YAML need not say.
        sequence_length: tokens per sequence, if not the YAML's `max_length`.

    Raises:
        CheckpointError: it describes something that our model is not; the message names the field.
    """
    decoder, block = config["token_decoder"], config["block_decoder"]
    _check_kinds(config)
    strategy = decoder.get("decoding_strategy")
    if strategy not in ("prefix", "summation"):
        raise _refusal("token_decoder.decoding_strategy", strategy, "prefix or summation")
    length = block_length_of(config)
    try:
        return ModelConfig(
            vocab_size=vocab_size,
            sequence_length=sequence_length or int(config.get("max_length") or DEFAULT_SEQUENCE_LENGTH),
            block_length=length,
            block_decoder=_stack(block, "block_decoder"),
            token_decoder=_stack(decoder, "token_decoder"),
            embedder=_embedder(config),
            token_decoder_input=strategy,
            prefix_length=int(decoder.get("expansion_ratio") or 1) if strategy == "prefix" else 1,
            backbone=_backbone(config),
        )
    except ValidationError as error:
        raise CheckpointError(f"the reference YAML describes no model of ours: {error.errors()[0]['msg']}") from None


def block_length_of(config: Mapping[str, Any]) -> int:
    """Tokens per block.

    Raises:
        CheckpointError: the YAML does not say, or blocks vary in length.
    """
    split = config.get("block_split") or {}
    if split.get("distribution", "fixed") != "fixed":
        raise _refusal("block_split.distribution", split["distribution"], "fixed")
    length = config.get("block_length", (split.get("distribution_kwargs") or {}).get("length"))
    if not isinstance(length, int):
        raise _refusal("block_split.distribution_kwargs.length", length, "a whole number")
    return length


def autofilled_heads(width: int) -> int:
    """Attention heads that the reference code fills in for a width: 32, 64 or 128 values per head."""
    return width // (32 if width <= 256 else 64 if width <= 1536 else 128)


def section_config(section: Mapping[str, Any]) -> Mapping[str, Any]:
    """The model configuration inside a section of the YAML; it may be empty."""
    return section.get("config") or {}


def heads_of(section: Mapping[str, Any]) -> int:
    """Attention heads of a section, given or filled in."""
    config = section_config(section)
    return int(config.get("num_attention_heads") or autofilled_heads(int(config["hidden_size"])))


def _check_kinds(config: Mapping[str, Any]) -> None:
    embedder, block, decoder = config["embedder"], config["block_decoder"], config["token_decoder"]
    if embedder.get("cls") not in ("lookup", *ENCODERS):
        raise _refusal("embedder.cls", embedder.get("cls"), "lookup, roberta or roberta_cls")
    if embedder.get("n_embedding_tokens", 1) != 1:
        raise _refusal("embedder.n_embedding_tokens", embedder["n_embedding_tokens"], "1")
    if decoder.get("decoding_strategy") == "cross_attention" or decoder.get("cls") == "t5":
        raise CheckpointError(
            "the reference YAML has a T5 token decoder (token_decoder.cls=t5, cross_attention), which is not "
            "supported: our cross-attention decoder is built of GPT-NeoX layers, so its weights have no place"
        )
    for name, section in (("block_decoder", block), ("token_decoder", decoder)):
        if section.get("cls", NEOX) != NEOX:
            raise _refusal(f"{name}.cls", section["cls"], NEOX)
        allowed = HARMLESS_FIELDS | STACK_FIELDS | BACKBONE_FIELDS.keys()
        for field in section_config(section):
            if field not in allowed:
                raise _refusal(f"{name}.config.{field}", section_config(section)[field], "left out")
    if decoder.get("expansion_method", "expansion_layer") != "expansion_layer":
        raise _refusal("token_decoder.expansion_method", decoder["expansion_method"], "expansion_layer")


def _stack(section: Mapping[str, Any], name: str) -> DecoderConfig:
    config = section_config(section)
    for field in ("num_hidden_layers", "hidden_size"):
        if not isinstance(config.get(field), int):
            raise _refusal(f"{name}.config.{field}", config.get(field), "a whole number")
    return DecoderConfig(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        num_attention_heads=heads_of(section),
        ffn_hidden_size=config.get("intermediate_size"),
    )


def _backbone(config: Mapping[str, Any]) -> BackboneConfig:
    values: dict[str, Any] = {}
    sections = [section_config(config[name]) for name in ("block_decoder", "token_decoder")]
    for field, default in BACKBONE_FIELDS.items():
        block, token = (section.get(field, default) for section in sections)
        if block != token:
            raise CheckpointError(
                f"the reference YAML has block_decoder.config.{field}={block!r} and token_decoder.config.{field}="
                f"{token!r}; different values are not supported"
            )
        values[field] = block
    for field, expected in FIXED_FIELDS.items():
        given = values.get(field, expected)
        if given != expected or any(section.get(field, expected) != expected for section in sections):
            raise _refusal(f"block_decoder.config.{field}", given, repr(expected))
    return BackboneConfig(
        norm_epsilon=values["layer_norm_eps"],
        residual="parallel" if values["use_parallel_residual"] else "sequential",
        rotary_fraction=values["rotary_pct"],
        rotary_base=values["rotary_emb_base"],
    )


def _embedder(config: Mapping[str, Any]) -> EmbedderConfig:
    section = config["embedder"]
    kind, method, details = section["cls"], section.get("projection_method"), section_config(section)
    if kind in ENCODERS:
        if method not in (None, "projection_layer"):
            raise _refusal("embedder.projection_method", method, "projection_layer for an encoder")
        _check_encoder(details)
        encoder = EncoderConfig(
            num_layers=details["num_hidden_layers"],
            hidden_size=details["hidden_size"],
            num_attention_heads=heads_of(section),
            ffn_hidden_size=details.get("intermediate_size"),
            max_positions=details.get("max_position_embeddings", POSITION_ROWS),
        )
        return EmbedderConfig(kind=kind, num_cls_tokens=section.get("n_cls_tokens") or 3, encoder=encoder)
    if method == "projection_layer":
        return EmbedderConfig(kind="lookup_projection", table_width=details.get("hidden_size"))
    if method not in (None, "concat"):
        raise _refusal("embedder.projection_method", method, "concat or projection_layer")
    expected = int(section_config(config["block_decoder"])["hidden_size"]) // block_length_of(config)
    if details.get("hidden_size", expected) != expected:
        raise _refusal("embedder.config.hidden_size", details["hidden_size"], f"{expected} where embeddings are joined")
    return EmbedderConfig()


def _check_encoder(details: Mapping[str, Any]) -> None:
    for field in ("num_hidden_layers", "hidden_size"):
        if not isinstance(details.get(field), int):
            raise _refusal(f"embedder.config.{field}", details.get(field), "a whole number")
    for field, expected in {"hidden_act": "gelu", "layer_norm_eps": 1e-5}.items():
        if details.get(field, expected) != expected:
            raise _refusal(f"embedder.config.{field}", details[field], repr(expected))


def _refusal(field: str, value: object, supported: str) -> CheckpointError:
    return CheckpointError(f"the reference YAML has {field}={value!r}; supported is {supported}")


def reference_from_model(model: ModelConfig) -> dict[str, Any]:
    """The trainer YAML that the reference code builds our model from.

    Raises:
        CheckpointError: the reference code has no such model; the message names the setting.
    """
    check_expressible(model)
    strategy = model.token_decoder_input
    decoder = {"decoding_strategy": strategy, "expansion_method": "expansion_layer"}
    if strategy == "prefix":
        decoder["expansion_ratio"] = model.prefix_length  # type: ignore[assignment]
    return {
        "block_length": model.block_length,
        "max_length": model.sequence_length,
        "block_split": {"distribution": "fixed", "distribution_kwargs": {"length": model.block_length}},
        "embedder": _embedder_section(model),
        "block_decoder": _stack_section(model, model.blocks),
        "token_decoder": _stack_section(model, model.tokens) | decoder,
    }


def check_expressible(model: ModelConfig) -> None:
    """Makes sure that the reference code has a model like ours.

    Raises:
        CheckpointError: it has not.
    """
    backbone = model.backbone
    reasons = {
        "architecture=vanilla": not model.is_block,
        f"backbone.norm={backbone.norm}": backbone.norm != "layer_norm",
        f"backbone.feed_forward={backbone.feed_forward}": backbone.feed_forward != "gelu",
        f"backbone.bias={backbone.bias}": backbone.bias != "all",
        "backbone.query_key_norm=true": backbone.query_key_norm,
        "tie_word_embeddings=true": model.tie_word_embeddings,
        "token_decoder_input=cross_attention": model.has_cross_attention,
        "num_key_value_heads": any(stack.queries_per_group > 1 for stack in model.stacks),
        "attention_head_size": any(stack.attention_size != stack.hidden_size for stack in model.stacks),
    }
    for reason, holds in reasons.items():
        if holds:
            raise CheckpointError(f"the reference code has no model with {reason}; export with --to huggingface")


def _embedder_section(model: ModelConfig) -> dict[str, Any]:
    embedder = model.embedder
    section: dict[str, Any] = {"cls": embedder.kind, "n_embedding_tokens": 1, "use_pretrained_weights": False}
    if embedder.has_encoder:
        encoder = embedder.roberta
        config = {
            "vocab_size": model.vocab_size,
            "num_hidden_layers": encoder.num_layers,
            "hidden_size": encoder.hidden_size,
            "num_attention_heads": encoder.num_attention_heads,
            "intermediate_size": encoder.stack.feed_forward_size,
            "max_position_embeddings": encoder.max_positions,
        }
        section |= {"model_name_or_path": "roberta-base", "projection_method": "projection_layer", "config": config}
        section["n_cls_tokens"] = embedder.num_cls_tokens if embedder.kind == "roberta_cls" else None
        return section
    width = embedder.vector_width(model.blocks.hidden_size, model.block_length)
    method = "projection_layer" if embedder.has_projection else "concat"
    config = {"vocab_size": model.vocab_size, "hidden_size": width}
    return section | {"cls": "lookup", "model_name_or_path": None, "projection_method": method, "config": config}


def _stack_section(model: ModelConfig, stack: DecoderConfig) -> dict[str, Any]:
    backbone = model.backbone
    config = {
        "num_hidden_layers": stack.num_layers,
        "hidden_size": stack.hidden_size,
        "num_attention_heads": stack.num_attention_heads,
        "intermediate_size": stack.feed_forward_size,
        "vocab_size": model.vocab_size,
        "layer_norm_eps": backbone.norm_epsilon,
        "use_parallel_residual": backbone.residual == "parallel",
        "rotary_pct": backbone.rotary_fraction,
        "rotary_emb_base": backbone.rotary_base,
    }
    base = "EleutherAI/pythia-410m-deduped"
    return {"cls": NEOX, "model_name_or_path": base, "use_pretrained_weights": False, "config": config}
