"""A tiny vanilla model for tests of uptraining."""

from pathlib import Path

import torch
import transformers

from tests.train.small_run import VOCABULARY

WIDTH, HEADS, LAYERS = 32, 4, 3


def save_vanilla_model(folder: Path) -> Path:
    """A Hugging Face GPT-NeoX model with random weights, which fits the small run's target."""
    config = transformers.GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    transformers.GPTNeoXForCausalLM(config).save_pretrained(folder)
    return folder
