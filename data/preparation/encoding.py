"""What a worker does: raw chunks in, token ids out."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.manifest import dtype_for
from data.preparation.chunks import Chunk, Rejection
from data.preparation.documents import Document, parse_chunk
from data.preparation.records import EMPTY, TOO_SHORT
from data.tokenizer import Tokenizer, load_tokenizer

TRAIN, VALIDATION = "train", "validation"
# A hash of 128 bits: among 2**32 documents, two that differ are taken for equal once in 2**65 corpora.
CONTENT_HASH_BYTES = 16


class Position(NamedTuple):
    """A place in the whole input.

    Attributes:
        file: Number of the file, training inputs first.
        line: Line or row in it, from 1 on.
    """

    file: int
    line: int


@dataclass(frozen=True)
class EncodingSettings:
    """What a worker must know.

    Attributes:
        tokenizer: Tokenizer file.
        text_field: Field or column with the text.
        validation_fraction: Share of the documents of training inputs that goes to validation.
        validation_from: Number of the first validation input.
        min_tokens: Shorter documents are rejected.
        hash_documents: Whether to compute hashes of the texts.
        finished: By split, the last position that finished shards hold.
    """

    tokenizer: Path
    text_field: str
    validation_fraction: float
    validation_from: int
    min_tokens: int
    hash_documents: bool
    finished: dict[str, Position]


@dataclass
class EncodedDocuments:
    """Documents of one chunk and one split, and what was rejected; n documents with t tokens in all.

    Attributes:
        lines: [n] line of each.
        sizes: [n] bytes of the text in UTF-8.
        lengths: [n] number of tokens.
        tokens: [t] token ids, uint16 or uint32 as they are stored.
        hashes: [n, 2] hash of the text, or [0, 2].
        rejections: Pieces without a document, in order.
    """

    lines: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    tokens: NDArray[np.unsignedinteger] = field(default_factory=lambda: np.empty(0, np.uint16))
    hashes: NDArray[np.uint64] = field(default_factory=lambda: np.empty((0, 2), np.uint64))
    rejections: list[Rejection] = field(default_factory=list)


@dataclass(frozen=True)
class NumberedChunk:
    """A chunk and the number of its file."""

    file: int
    chunk: Chunk


@dataclass(frozen=True)
class EncodedChunk:
    """What became of a chunk.

    Attributes:
        file: Number of its file.
        consumed: Bytes of the file up to its end.
        splits: Its documents.
    """

    file: int
    consumed: int
    splits: dict[str, EncodedDocuments]


def chunk_encoder(settings: EncodingSettings) -> Callable[[NumberedChunk], EncodedChunk]:
    """Loads the tokenizer.

    Args:
        settings: What the worker must know.

    Returns:
        A function that encodes chunks.
    """
    # The workers are the parallelism; threads of the tokenizer library would only get in each other's way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = load_tokenizer(settings.tokenizer)
    return lambda numbered: _encode_chunk(settings, tokenizer, numbered)


def _encode_chunk(settings: EncodingSettings, tokenizer: Tokenizer, numbered: NumberedChunk) -> EncodedChunk:
    found: dict[str, list[Document]] = {}
    splits: dict[str, EncodedDocuments] = {}
    default = VALIDATION if numbered.file >= settings.validation_from else TRAIN
    for piece in parse_chunk(numbered.chunk, settings.text_field):
        split = _split_of(piece, default, settings.validation_fraction)
        if (numbered.file, piece.line) <= settings.finished[split]:
            continue
        if isinstance(piece, Rejection):
            splits.setdefault(split, EncodedDocuments()).rejections.append(piece)
        else:
            found.setdefault(split, []).append(piece)
    for split, documents in found.items():
        encoded = splits.setdefault(split, EncodedDocuments())
        _encode(settings, tokenizer, numbered.chunk.path, documents, encoded)
    return EncodedChunk(numbered.file, numbered.chunk.consumed, splits)


def _split_of(piece: Document | Rejection, default: str, validation_fraction: float) -> str:
    if not validation_fraction or isinstance(piece, Rejection):
        return default
    digest = hashlib.sha256(piece.utf8).digest()
    return VALIDATION if int.from_bytes(digest[:8]) < validation_fraction * 2**64 else default


def _encode(
    settings: EncodingSettings, tokenizer: Tokenizer, path: Path, documents: list[Document], encoded: EncodedDocuments
) -> None:
    dtype = dtype_for(tokenizer.vocab_size)
    arrays = []
    kept = []
    for document, ids in zip(documents, tokenizer.encode_batch([document.text for document in documents]), strict=True):
        if not ids or len(ids) < settings.min_tokens:
            reason = TOO_SHORT if ids else EMPTY
            encoded.rejections.append(Rejection(str(path), document.line, reason, ""))
            continue
        array = np.array(ids, dtype=np.uint32)
        # Before the type gets narrower, so that nothing wraps around.
        if (largest := int(array.max())) >= tokenizer.vocab_size:
            raise DataError(
                f"{path}, line {document.line}: tokenizer {tokenizer.path} gives token id {largest}, its vocabulary "
                f"has {tokenizer.vocab_size}; fetch the tokenizer again"
            )
        kept.append(document)
        arrays.append(array.astype(dtype))
    encoded.rejections.sort(key=lambda rejection: rejection.line)
    encoded.lines = [document.line for document in kept]
    encoded.sizes = [len(document.utf8) for document in kept]
    encoded.lengths = [len(array) for array in arrays]
    encoded.tokens = np.concatenate(arrays) if arrays else np.empty(0, dtype)
    if settings.hash_documents:
        digests = b"".join(hashlib.blake2b(d.utf8, digest_size=CONTENT_HASH_BYTES).digest() for d in kept)
        encoded.hashes = np.frombuffer(digests, dtype="<u8").reshape(-1, 2)
