"""Documents of a shard as text."""

from pathlib import Path

from data.errors import DataError
from data.inspection.corpus import CorpusSplit
from data.tokenizer import load_tokenizer


def describe_documents(root: Path, split: str, shard: int, first: int, count: int, characters: int) -> str:
    """Decodes consecutive documents.

    Args:
        root: A prepared directory.
        split: `train` or `validation`.
        shard: Number of the shard.
        first: Number of the first document in it.
        count: How many.
        characters: How much of each; 0 for all.

    Returns:
        A heading and the text of each document.

    Raises:
        DataError: There is no such split, shard or document, one is damaged, or a number is impossible.
    """
    if count < 1:
        raise DataError(f"--count {count} must be at least 1")
    if characters < 0:
        raise DataError(f"--characters {characters} must be at least 1, or 0 for all")
    opened = CorpusSplit(root, split)
    record = opened.shard(shard)
    tokenizer = load_tokenizer(root / opened.manifest.tokenizer_file)
    lines = []
    for number, tokens in enumerate(opened.documents(record, first, count), start=first):
        text = tokenizer.decode(tokens.tolist())
        shown = text if not characters or len(text) <= characters else text[:characters] + " ..."
        lines += [f"--- {split} shard {shard}, document {number}: {len(tokens):,} tokens", shown]
    return "\n".join(lines)
