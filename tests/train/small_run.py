"""A tiny corpus of real text and a tiny run on it, for tests that train."""

import json
import lzma
from pathlib import Path
from typing import Any

from data.preparation.prepare import PreparationOptions, prepare
from data.preparation.tokenizer_training import train_sentencepiece
from train.config import RunConfig

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "corpus"
VOCABULARY = 384


def prepare_small_corpus(
    folder: Path, start: int = 20_000, characters: int = 4_000, tokenizer: Path | None = None
) -> Path:
    """Shards of a part of the bundled validation books; 4,000 characters are about 40 sequences of 64 tokens."""
    folder.mkdir(exist_ok=True)
    with lzma.open(EXAMPLES / "validation.jsonl.xz", "rt", encoding="utf-8") as books:
        text = json.loads(next(books))["text"]
    paths = []
    for name, offset in (("train", start), ("validation", 60_000)):
        paths.append(folder / f"{name}.txt")
        paths[-1].write_text(text[offset : offset + characters])
    if tokenizer is None:
        tokenizer = folder / "tokenizer.model"
        train_sentencepiece([paths[0]], VOCABULARY, tokenizer)
    prepare(
        PreparationOptions(
            inputs=(paths[0],),
            output=folder / "shards",
            tokenizer=tokenizer,
            validation_inputs=(paths[1],),
            validation_fraction=0.0,
            workers=1,
            shard_tokens=1 << 20,
        )
    )
    return folder / "shards"


def small_run(root: Path, shards: Path, name: str = "small", **sections: dict[str, Any]) -> RunConfig:
    """A run of 14 steps of 4 sequences with two processes; sections override single values."""
    stack = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4}
    values: dict[str, dict[str, Any]] = {
        "run": {"name": name, "root": str(root)},
        "model": {
            "vocab_size": VOCABULARY,
            "sequence_length": 64,
            "block_decoder": stack,
            "token_decoder": {**stack, "num_layers": 2},
        },
        "parallel": {"data": 2, "zero_stage": 1},
        "data": {"path": str(shards)},
        "train": {"steps": 14, "global_batch_size": 4, "micro_batch_size": 1, "precision": "fp32"},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 3},
        "validation": {"every": 5, "sequences": 6},
        "checkpoint": {"every": 3},
        "logging": {"every": 1},
    }
    for section, changes in sections.items():
        values[section] = {**values.get(section, {}), **changes}
    return RunConfig.model_validate(values)
