"""Reads what a preparation has made."""

from pathlib import Path

import numpy as np

from data.manifest import read_manifest
from data.shards import ShardReader, read_document_lengths
from data.tokenizer import load_tokenizer


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def texts(directory: Path, split: str) -> list[str]:
    manifest = read_manifest(directory / split)
    tokenizer = load_tokenizer(directory / manifest.tokenizer_file)
    found = []
    for record in manifest.shards:
        tokens = ShardReader(directory / split / record.file, record, manifest.dtype).read(0, record.tokens)
        lengths = read_document_lengths(directory / split, record)
        found += [tokenizer.decode(part.tolist()) for part in np.split(tokens, np.cumsum(lengths)[:-1])]
    return found
