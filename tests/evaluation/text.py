"""Real text and a small tokenizer for evaluations of documents."""

import functools
import json
import lzma
from pathlib import Path

from data.preparation.tokenizer_training import train_sentencepiece
from data.tokenizer import Tokenizer, load_tokenizer
from parallel.component_config import DecoderConfig
from parallel.config import ModelConfig, ParallelConfig
from parallel.stage import Stage, build_stage

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "corpus"
VOCABULARY = 384


@functools.cache
def book() -> str:
    """The first of the bundled validation books."""
    with lzma.open(EXAMPLES / "validation.jsonl.xz", "rt", encoding="utf-8") as books:
        text: str = json.loads(next(books))["text"]
    return text


def small_tokenizer(folder: Path) -> Tokenizer:
    """Trained on a part of the book; a token for each digit."""
    source = folder / "source.txt"
    source.write_text(book()[20_000:60_000])
    train_sentencepiece([source], VOCABULARY, folder / "tokenizer.model")
    return load_tokenizer(folder / "tokenizer.model")


def small_model(kind: str = "prefix", length: int = 4, sequence_length: int = 64) -> ModelConfig:
    """A small model that knows the tokenizer's tokens; `kind` is vanilla or how the token decoder reads contexts."""
    wide = DecoderConfig(num_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
    narrow = DecoderConfig(num_layers=2, hidden_size=16, num_attention_heads=2)
    shape = {"vocab_size": VOCABULARY, "sequence_length": sequence_length, "initializer_std": 0.3}
    if kind == "vanilla":
        return ModelConfig(architecture="vanilla", decoder=wide, **shape)  # type: ignore[arg-type]
    return ModelConfig(
        block_length=length,
        token_decoder_input=kind,  # type: ignore[arg-type]
        block_decoder=wide,
        token_decoder=narrow,
        **shape,  # type: ignore[arg-type]
    )


def small_stage(kind: str = "prefix", length: int = 4, sequence_length: int = 64) -> Stage:
    """That model with random weights."""
    return build_stage(small_model(kind, length, sequence_length), ParallelConfig(), seed=1).eval()
