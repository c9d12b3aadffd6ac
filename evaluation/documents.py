"""Long documents as token sequences of one length, for evaluations that need text without gaps."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.errors import DataError
from data.preparation.documents import read_documents
from data.preparation.inputs import expand_inputs
from data.tokenizer import Tokenizer
from parallel.config import ModelConfig
from parallel.errors import ConfigurationError

# A constant: the same files and limit give the same chunks.
SAMPLING_SEED = 0


@dataclass(frozen=True)
class DocumentChunks:
    """Documents cut into chunks of one length that do not overlap.

    Attributes:
        token_ids: int32 [C, S], in the order of the documents.
        documents: documents that gave at least one chunk.
        too_short: documents with fewer than S tokens, which are left out.
        available: chunks before a limit was applied.
        left_over: tokens behind the last whole chunk of a document, and those of the documents that are too short.
    """

    token_ids: np.ndarray
    documents: int
    too_short: int
    available: int
    left_over: int

    @property
    def length(self) -> int:
        """Tokens of a chunk (S)."""
        return int(self.token_ids.shape[1])

    def __len__(self) -> int:
        return len(self.token_ids)

    def batches(self, batch_tokens: int, device: torch.device) -> Iterator[Tensor]:
        """Chunks in order, int64 [B, S], in batches of at most so many tokens, but at least one chunk."""
        size = max(1, batch_tokens // self.length)
        with tqdm(total=len(self), unit="chunk", disable=None) as bar:
            for start in range(0, len(self), size):
                batch = torch.from_numpy(self.token_ids[start : start + size].astype(np.int64))
                yield batch.to(device)
                bar.update(len(batch))

    def describe(self) -> str:
        """Sums up in one line what was read."""
        chosen = f"{len(self):,} of {self.available:,}" if len(self) < self.available else f"{len(self):,}"
        return (
            f"{chosen} chunks of {self.length:,} tokens from {self.documents:,} documents "
            f"({self.too_short:,} shorter ones and {self.left_over:,} tokens in all left out)"
        )


def chunk_length(model: ModelConfig, length: int | None, option: str) -> int:
    """The context length of an evaluation: the model's, or another one that holds whole blocks.

    Raises:
        ConfigurationError: the length does not fit the model.
    """
    if length is None:
        return model.sequence_length
    unit = model.unit_length
    if length < 2 * unit or length % unit:
        usable = max(2, length // unit) * unit
        raise ConfigurationError(
            f"{option} {length} does not fit the model: its blocks have {unit} tokens, and a context needs at least "
            f"two whole ones; use {usable}"
        )
    return length


def read_chunks(path: Path, option: str, tokenizer: Tokenizer, length: int, limit: int | None = None) -> DocumentChunks:
    """Reads documents and cuts them into chunks.

    Args:
        path: A file, a glob pattern or a folder, of the kinds that tools/prepare_data.py takes.
        option: Its option on the command line, for messages.
        tokenizer: The model's.
        length: Tokens of a chunk.
        limit: At most so many chunks: a uniform sample of all, the same one each time. Memory is 4 bytes for each of
            their tokens.

    Raises:
        DataError: nothing is found, a file cannot be read, or no document is long enough.
    """
    generator = random.Random(SAMPLING_SEED)
    kept: list[tuple[int, np.ndarray]] = []
    documents = too_short = available = left_over = longest = 0
    for text in _documents(path, option):
        ids = tokenizer.encode(text)
        count = len(ids) // length
        documents, too_short = documents + (count > 0), too_short + (count == 0)
        left_over, longest = left_over + len(ids) - count * length, max(longest, len(ids))
        for start in range(0, count * length, length):
            if limit is None or len(kept) < limit:
                kept.append((available, np.array(ids[start : start + length], dtype=np.int32)))
            elif (slot := generator.randrange(available + 1)) < limit:
                kept[slot] = (available, np.array(ids[start : start + length], dtype=np.int32))
            available += 1
    if not kept:
        raise DataError(
            f"{option} {path} holds no document of {length} tokens, the longest has {longest}; give longer documents, "
            f"or a context length of at most {longest}"
        )
    chunks = np.stack([ids for _, ids in sorted(kept, key=lambda entry: entry[0])])
    return DocumentChunks(chunks, documents, too_short, available, left_over)


def _documents(path: Path, option: str) -> Iterator[str]:
    files = expand_inputs([path], option).files
    total = sum(file.stat().st_size for file in files)
    with tqdm(total=total, unit="B", unit_scale=True, desc="tokenizing", disable=None, leave=False) as bar:
        for file in files:
            yield from read_documents(file, bar.update)
