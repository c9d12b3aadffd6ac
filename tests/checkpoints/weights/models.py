"""Sources for conversions: models of transformers, of the reference code and of ours, small and random."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from safetensors.torch import load_file
from torch import Tensor

from checkpoints.fragments import write_fragments
from checkpoints.records import Fragment
from checkpoints.store import CheckpointStore
from checkpoints.weights.conversion import Conversion, convert
from checkpoints.weights.conversion_check import Difference
from checkpoints.weights.parameter_shapes import parameter_shapes
from checkpoints.weights.weight_source import open_weight_source
from parallel.config import ModelConfig
from tests.golden_reference import GOLDEN, GoldenSet

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
GROUPED = {"num_key_value_heads": 2}
FAMILY_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "Pythia": ("GPTNeoX", {}),
    "GPT-NeoX, sequential, tied": ("GPTNeoX", {"use_parallel_residual": False, "tie_word_embeddings": True}),
    "Llama, grouped": ("Llama", GROUPED | {"rms_norm_eps": 1e-5}),
    "Llama with biases, multi-query": (
        "Llama",
        {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True, "head_dim": 12},
    ),
    "Mistral": ("Mistral", GROUPED),
    "Qwen2": ("Qwen2", GROUPED),
    "Qwen2, tied": ("Qwen2", GROUPED | {"tie_word_embeddings": True}),
    "Qwen3": ("Qwen3", GROUPED | {"head_dim": 16}),
}


def transformers_model(kind: str, **options: Any) -> transformers.PreTrainedModel:
    """A model of transformers in fp32 whose every parameter is random and matters."""
    config = getattr(transformers, f"{kind}Config")(**(SIZES | options))
    config.rope_parameters["rope_theta"] = 5000.0
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.5)
    return model


def save_transformers(folder: Path, kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """Saves such a model as transformers does."""
    transformers_model(kind, **options).to(dtype).save_pretrained(folder)
    return folder


def random_tokens(rows: int = 2, length: int = 32, vocab_size: int = 96) -> Tensor:
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(3))


def converted(source: Path, output: Path, target: str, config: Path | None = None, **options: Any) -> Difference:
    """Converts a folder; returns how far the logits are apart."""
    with open_weight_source(source, config) as opened:
        return convert(opened, output, Conversion(target, **options), lambda line: None)


def save_ours(folder: Path, model: ModelConfig) -> Path:
    """A checkpoint of our model with random weights."""
    generator = torch.Generator().manual_seed(11)
    store = CheckpointStore(folder / "checkpoints")
    temporary = store.begin(0)
    fragments = []
    for name, shape in parameter_shapes(model).items():
        values = torch.randn(shape, generator=generator) * 0.3 + (0.5 if len(shape) == 1 else 0.0)
        fragments.append((Fragment(name, "weight", shape, None, 0, 0, 0, values.numel()), values.flatten()))
    record = write_fragments(temporary / "weights_00001.safetensors", fragments)
    store.publish(0, temporary, [record], {"config": {"model": model.model_dump(mode="json")}})
    return folder


def write_trainer_yaml(path: Path, golden: GoldenSet) -> Path:
    """The trainer YAML of a golden set, in the fields that the reference code reads."""
    model, embedder = golden.config, golden.config.embedder
    section: dict[str, Any] = {"cls": "lookup", "projection_method": "concat", "config": {}}
    if embedder.kind == "lookup_projection":
        section |= {"projection_method": "projection_layer", "config": {"hidden_size": embedder.table_width}}
    elif embedder.has_encoder:
        sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 128}
        section = {"cls": embedder.kind, "projection_method": None, "config": sizes}
        section["n_cls_tokens"] = 3 if embedder.kind == "roberta_cls" else None
    stacks = [
        {
            "cls": "gpt-neo-x",
            "attn_implementation": "eager",
            "config": {
                "num_hidden_layers": stack.num_layers,
                "hidden_size": stack.hidden_size,
                "num_attention_heads": stack.num_attention_heads,
                "vocab_size": model.vocab_size,
            },
        }
        for stack in model.stacks
    ]
    decoder = stacks[1] | {"expansion_method": "expansion_layer", "decoding_strategy": model.token_decoder_input}
    if model.token_decoder_input == "prefix":
        decoder["expansion_ratio"] = model.prefix_length
    split = {"distribution": "fixed", "distribution_kwargs": {"length": model.block_length}}
    content = {"block_split": split, "embedder": section, "block_decoder": stacks[0], "token_decoder": decoder}
    path.write_text(yaml.safe_dump(content))
    return path


def golden_weights(name: str) -> Path:
    return GOLDEN / name


def same_tensors(first: Path, second: Path) -> bool:
    """Whether two files hold the same tensors to the bit."""
    ours, theirs = load_file(first), load_file(second)
    same_names = ours.keys() == theirs.keys()
    return same_names and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours
    )


def edit_json(path: Path, **changes: Any) -> None:
    """Changes fields of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
