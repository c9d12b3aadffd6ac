"""config.json of Hugging Face <-> our model settings, for GPT-NeoX (Pythia), Llama, Mistral, Qwen2 and Qwen3.

Reads the layout of transformers 5 (`rope_parameters`) and the older one (`rope_theta`, `rotary_pct`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from checkpoints.errors import CheckpointError
from parallel.component_config import BackboneConfig, DecoderConfig
from parallel.config import ModelConfig

GPT_NEOX = "gpt_neox"
FAMILIES = (GPT_NEOX, "llama", "mistral", "qwen2", "qwen3")
ARCHITECTURES = {
    GPT_NEOX: "GPTNeoXForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")

_ROPE_SCALING_TYPES = (None, "default")
_DEFAULT_HEAD_SIZE = {"qwen3": 128}


@dataclass(frozen=True)
class RotarySettings:
    """Rotary embedding of a source: its base and the part of each head that is rotated."""

    base: float
    fraction: float


def model_from_huggingface(config: Mapping[str, Any], sequence_length: int | None = None) -> ModelConfig:
    """Our settings of a model that a config.json describes.

    Args:
        config: contents of the file.
        sequence_length: tokens per sequence, if not the file's `max_position_embeddings`.

    Raises:
        CheckpointError: it describes something that our model is not; the message names the field.
    """
    family = family_of(config)
    length = sequence_length or _integer(config, "max_position_embeddings", 2048)
    _check_activation(config, family)
    _check_attention_window(config, family, length)
    rotary = rotary_settings(config)
    backbone: dict[str, Any] = {"rotary_fraction": rotary.fraction, "rotary_base": rotary.base}
    backbone |= _neox_backbone(config) if family == GPT_NEOX else _llama_backbone(config, family)
    try:
        return ModelConfig(
            architecture="vanilla",
            vocab_size=_integer(config, "vocab_size"),
            sequence_length=length,
            decoder=DecoderConfig(**_stack(config, family)),
            backbone=BackboneConfig(**backbone),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            initializer_std=_number(config, "initializer_range", 0.02),
        )
    except ValidationError as error:
        first = error.errors()[0]
        field, reason = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        given = f"{field}={first['input']!r}: " if field and first["type"] != "value_error" else ""
        raise CheckpointError(f"config.json describes no model of ours: {given}{reason}") from None


def family_of(config: Mapping[str, Any]) -> str:
    """The family of a config.json.

    Raises:
        CheckpointError: it is not supported.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise CheckpointError(f"config.json has model_type={family!r}, which is not one of {', '.join(FAMILIES)}")
    return str(family)


def rotary_settings(config: Mapping[str, Any]) -> RotarySettings:
    """Base and fraction of the rotary embedding, from either layout of the file.

    Raises:
        CheckpointError: positions are scaled.
    """
    parameters = _section(config, "rope_parameters")
    scaling = _section(config, "rope_scaling") or parameters
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind not in _ROPE_SCALING_TYPES:
        field = "rope_parameters" if scaling is parameters else "rope_scaling"
        raise CheckpointError(f"config.json has {field} of type {kind!r}; scaled rotary positions are not supported")
    neox = config.get("model_type") == GPT_NEOX
    base = _number(config, "rotary_emb_base" if neox else "rope_theta", 10000.0)
    fraction = _number(config, "rotary_pct", 0.25) if neox else _number(config, "partial_rotary_factor", 1.0)
    return RotarySettings(
        _number(parameters, "rope_theta", base), _number(parameters, "partial_rotary_factor", fraction)
    )


def head_size_of(config: Mapping[str, Any]) -> int:
    """Width of one attention head."""
    default = _DEFAULT_HEAD_SIZE.get(str(config.get("model_type")))
    if config.get("head_dim", default) is None:
        return _integer(config, "hidden_size") // _integer(config, "num_attention_heads")
    return _integer(config, "head_dim", default)


def _stack(config: Mapping[str, Any], family: str) -> dict[str, Any]:
    width, heads = _integer(config, "hidden_size"), _integer(config, "num_attention_heads")
    is_grouped = family != GPT_NEOX and config.get("num_key_value_heads") is not None
    groups = _integer(config, "num_key_value_heads") if is_grouped else heads
    head_size = width // heads if family == GPT_NEOX else head_size_of(config)
    return {
        "num_layers": _integer(config, "num_hidden_layers"),
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": None if groups == heads else groups,
        "attention_head_size": None if head_size * heads == width else head_size,
        "ffn_hidden_size": _integer(config, "intermediate_size"),
    }


def _neox_backbone(config: Mapping[str, Any]) -> dict[str, Any]:
    if not config.get("attention_bias", True):
        raise CheckpointError("config.json has attention_bias=false; GPT-NeoX without these biases is not supported")
    parallel = config.get("use_parallel_residual", True)
    return {
        "norm": "layer_norm",
        "norm_epsilon": _number(config, "layer_norm_eps", 1e-5),
        "residual": "parallel" if parallel else "sequential",
        "feed_forward": "gelu",
        "bias": "all",
    }


def _llama_backbone(config: Mapping[str, Any], family: str) -> dict[str, Any]:
    bias: Literal["all", "query_key_value", "none"] = "query_key_value" if family == "qwen2" else "none"
    attention, feed_forward = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    if family == "llama" and attention and feed_forward:
        bias = "all"
    elif family in ("llama", "qwen3") and (attention or feed_forward):
        field = "attention_bias" if attention else "mlp_bias"
        raise CheckpointError(
            f"config.json has {field}=true; only llama with both attention_bias and mlp_bias, or none, is supported"
        )
    return {
        "norm": "rms_norm",
        "norm_epsilon": _number(config, "rms_norm_eps", 1e-6),
        "residual": "sequential",
        "feed_forward": "swiglu",
        "bias": bias,
        "query_key_norm": family == "qwen3",
    }


def _check_activation(config: Mapping[str, Any], family: str) -> None:
    expected = "gelu" if family == GPT_NEOX else "silu"
    given = config.get("hidden_act", expected)
    if given != expected:
        raise CheckpointError(f"config.json has hidden_act={given!r}; for {family} only {expected!r} is supported")


def _check_attention_window(config: Mapping[str, Any], family: str, length: int) -> None:
    if family == GPT_NEOX or config.get("sliding_window") is None:
        return
    window = _integer(config, "sliding_window")
    kinds = config.get("layer_types")
    if isinstance(kinds, list):
        used = "sliding_attention" in kinds
    else:
        used = family == "mistral" or bool(config.get("use_sliding_window"))
    if not used or window >= length:
        return
    raise CheckpointError(
        f"config.json has sliding_window={window}, which is shorter than sequences of {length} tokens and is not "
        f"supported; give --sequence-length {window}"
    )


def _integer(config: Mapping[str, Any], field: str, default: int | None = None) -> int:
    value = config.get(field, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"config.json has {field}={value!r}; it must be a whole number above 0")
    return value


def _number(config: Mapping[str, Any], field: str, default: float) -> float:
    value = config.get(field, default)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise CheckpointError(f"config.json has {field}={value!r}; it must be a number")
    return float(value)


def _section(config: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    value = config.get(field) or {}
    if not isinstance(value, Mapping):
        raise CheckpointError(f"config.json has {field}={value!r}; it must be an object")
    return value


def huggingface_from_model(
    model: ModelConfig, dtype: str, family: str | None = None, special_tokens: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Contents of the config.json that transformers reads as our vanilla model.

    Args:
        model: our settings.
        dtype: type of the stored weights, such as bfloat16.
        family: the family to prefer where several describe the same model.
        special_tokens: ids of the beginning and end of text, where known.

    Raises:
        CheckpointError: no supported family describes the model.
    """
    chosen = _family_for(model, family)
    stack, backbone = model.vanilla, model.backbone
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": backbone.rotary_base}
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[chosen]],
        "model_type": chosen,
        "vocab_size": model.vocab_size,
        "hidden_size": stack.hidden_size,
        "num_hidden_layers": stack.num_layers,
        "num_attention_heads": stack.num_attention_heads,
        "intermediate_size": stack.feed_forward_size,
        "max_position_embeddings": model.sequence_length,
        "initializer_range": model.initializer_std,
        "tie_word_embeddings": model.tie_word_embeddings,
        "torch_dtype": dtype,
        **{name: (special_tokens or {}).get(name) for name in SPECIAL_TOKENS},
    }
    if chosen == GPT_NEOX:
        rope["partial_rotary_factor"] = backbone.rotary_fraction
        return config | _neox_fields(model) | {"rope_parameters": rope}
    return config | _llama_fields(model, chosen) | {"rope_parameters": rope}


def _neox_fields(model: ModelConfig) -> dict[str, Any]:
    backbone = model.backbone
    return {
        "hidden_act": "gelu",
        "layer_norm_eps": backbone.norm_epsilon,
        "use_parallel_residual": backbone.residual == "parallel",
        "attention_bias": True,
        "rotary_pct": backbone.rotary_fraction,
        "rotary_emb_base": backbone.rotary_base,
    }


def _llama_fields(model: ModelConfig, family: str) -> dict[str, Any]:
    stack, backbone = model.vanilla, model.backbone
    fields: dict[str, Any] = {
        "hidden_act": "silu",
        "rms_norm_eps": backbone.norm_epsilon,
        "num_key_value_heads": stack.key_value_heads,
        "head_dim": stack.head_size,
        "rope_theta": backbone.rotary_base,
    }
    if family == "llama":
        fields |= {"attention_bias": backbone.bias == "all", "mlp_bias": backbone.bias == "all"}
    if family == "mistral":
        fields["sliding_window"] = None
    if family in ("qwen2", "qwen3"):
        fields["use_sliding_window"] = False
    return fields


def _family_for(model: ModelConfig, preferred: str | None) -> str:
    fitting = [family for family in FAMILIES if _fits(model, family)]
    if not fitting:
        raise CheckpointError(
            f"no Hugging Face architecture of {', '.join(FAMILIES)} is this vanilla model: model.backbone is "
            f"{model.backbone.model_dump()}"
        )
    return preferred if preferred in fitting else fitting[0]


def _fits(model: ModelConfig, family: str) -> bool:
    stack, backbone = model.vanilla, model.backbone
    if family == GPT_NEOX:
        plain = (backbone.norm, backbone.feed_forward, backbone.bias) == ("layer_norm", "gelu", "all")
        heads = stack.queries_per_group == 1 and stack.attention_size == stack.hidden_size
        return plain and heads and not backbone.query_key_norm
    llama = (backbone.norm, backbone.residual, backbone.feed_forward) == ("rms_norm", "sequential", "swiglu")
    biases = {"llama": ("none", "all"), "mistral": ("none",), "qwen2": ("query_key_value",), "qwen3": ("none",)}
    return (
        llama
        and backbone.rotary_fraction == 1.0
        and backbone.bias in biases[family]
        and backbone.query_key_norm == (family == "qwen3")
    )
