"""A few documents for each task that reads local files, and a small GPT-NeoX-like tokenizer."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, pre_tokenizers, trainers

from tests.evaluation.text import book

TOKENIZER_SIZE = 500


def sentences() -> list[str]:
    """Sentences of a real book."""
    flat = " ".join(book()[20_000:40_000].split())
    return [sentence.strip() for sentence in flat.split(". ") if 20 < len(sentence) < 120]


def write_local_files(folder: Path) -> Path:
    """Writes all files in the forms that the tasks read; answers are arbitrary."""
    said = sentences()
    pairs = list(zip(said[::2], said[1::2], strict=False))
    files: dict[str, list[dict[str, Any]]] = {
        "lambada_openai_test.jsonl": [
            {"text": " ".join(said[i : i + 1 + 3 * (i % 4)]).rstrip(".,;!?")} for i in range(8)
        ],
        "wikitext2_raw_test_docs.jsonl": [
            {"page": f" = {said[i][:12]} = \n \n " + " @-@ ".join(said[i : i + 2 + 5 * i]) + " , she said . \n"}
            for i in range(5)
        ],
        "hellaswag_val.jsonl": [
            {
                "activity_label": "Reading",
                "ctx_a": first,
                "ctx_b": "she",
                "endings": [f"[step] {ending}." for ending in said[i : i + 4]],
                "label": str(i % 4),
            }
            for i, (first, _) in enumerate(pairs[:6])
        ],
        "piqa_valid.jsonl": [
            {"goal": goal, "sol1": said[i], "sol2": said[i + 9], "label": i % 2}
            for i, (goal, _) in enumerate(pairs[:8])
        ],
        "arc_easy_test.jsonl": [
            {
                "question": f"{first}?",
                "choices": {"text": said[i : i + 3 + i % 2], "label": list("ABCD")[: 3 + i % 2]},
                "answerKey": "ABC"[i % 3],
            }
            for i, (first, _) in enumerate(pairs[:7])
        ],
        "winogrande_xl_validation.jsonl": [
            {"sentence": f"{first} because _ {rest}.", "option1": "Anne", "option2": "the horse", "answer": "12"[i % 2]}
            for i, (first, rest) in enumerate(pairs[:9])
        ],
        "sciq_validation.jsonl": [
            {
                "question": f"{first}?",
                **{
                    name: said[i + k].split()[0] for k, name in enumerate(("distractor1", "distractor2", "distractor3"))
                },
                "correct_answer": said[i + 5].split()[-1],
                "support": rest if i % 2 else "",
            }
            for i, (first, rest) in enumerate(pairs[:8])
        ],
    }
    for name, documents in files.items():
        write_lines(folder / name, documents)
    return folder


def write_lines(path: Path, documents: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    return path


def train_tokenizer(path: Path) -> Path:
    """Byte-level BPE with an end of text, id 0."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_SIZE,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([book()[20_000:60_000]], trainer)
    tokenizer.save(str(path))
    return path
