"""Packs the documents of one shard into sequences: a pure function of the document lengths and the settings.

A document becomes [left pads | its tokens | end of text | right pads]; the documents of a shard are laid end to end
and cut into sequences, and what does not fill a last sequence is dropped. Pads carry the end-of-text id and differ
from a real end of text only by the mask.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class PackingSettings:
    """How documents are padded.

    Attributes:
        block_length: Tokens per block.
        random_left_padding: Put 0 to block_length-1 pads before each document.
        pad_to_block_boundary: Fill the last block of each document.
        seed: Seed of the left padding draws.
    """

    block_length: int
    random_left_padding: bool
    pad_to_block_boundary: bool
    seed: int


class PackedRun(NamedTuple):
    """What a piece of the packed stream holds of one document.

    Attributes:
        start: Slot of the first token.
        tokens: Number of tokens.
        stop: One past the last real slot: the end of text, if the piece holds it, or the last token.
    """

    start: int
    tokens: int
    stop: int


class PackedSlice(NamedTuple):
    """Where the tokens of a piece of the packed stream come from.

    Attributes:
        token_start: First token of the shard that the piece holds.
        token_stop: One past the last.
        runs: Where these tokens go, in order; slots outside all runs are pads.
    """

    token_start: int
    token_stop: int
    runs: list[PackedRun]


def draw_left_pads(documents: int, settings: PackingSettings, shard_sha256: str) -> NDArray[np.int64]:
    """Draws the number of left pads of each document, the same for the same shard everywhere.

    Args:
        documents: Number of documents.
        settings: Block length and seed.
        shard_sha256: The shard's identity.

    Returns:
        [documents] numbers, uniform over 0 to block_length-1; zeros without random left padding.
    """
    if not settings.random_left_padding or settings.block_length == 1:
        return np.zeros(documents, dtype=np.int64)
    # NumPy keeps raw bits and seeding stable over its versions, but not the methods of Generator.
    bits = np.random.Philox(np.random.SeedSequence([settings.seed, int(shard_sha256[:32], 16)]))
    return (bits.random_raw(documents) % np.uint64(settings.block_length)).astype(np.int64)


class ShardPacking:
    """Random access to the packed stream of one shard.

    Attributes:
        packed_length: Slots of the stream: tokens, ends of text and pads of all documents.
        padding: Masked slots among them.
    """

    def __init__(self, doc_lengths: NDArray[np.int64], settings: PackingSettings, shard_sha256: str) -> None:
        """Lays out the stream.

        Args:
            doc_lengths: [documents] number of tokens of each document, without end of text.
            settings: How to pad.
            shard_sha256: The shard's identity, for the padding draws.
        """
        left_pads = draw_left_pads(len(doc_lengths), settings, shard_sha256)
        packed_lengths = left_pads + doc_lengths + 1
        if settings.pad_to_block_boundary:
            packed_lengths += -packed_lengths % settings.block_length
        ends = np.cumsum(packed_lengths)
        self.packed_length = int(ends[-1]) if len(ends) else 0
        self.padding = self.packed_length - int(doc_lengths.sum()) - len(doc_lengths)
        self._ends = ends
        # Slot of each document's first token and of its end of text, and the token's number in the shard.
        self._first_slots = ends - packed_lengths + left_pads
        self._eos_slots = self._first_slots + doc_lengths
        self._first_tokens = np.cumsum(doc_lengths) - doc_lengths

    def locate(self, start: int, stop: int) -> PackedSlice:
        """Finds what the slots [start, stop) of the stream hold.

        Args:
            start: First slot.
            stop: One past the last slot.

        Returns:
            The tokens to read and where they go, relative to `start`.
        """
        # Documents whose last real slot is not before the piece and whose first is not behind it.
        first = int(self._eos_slots.searchsorted(start, side="left"))
        last = int(self._first_slots.searchsorted(stop, side="left"))
        runs, total = [], 0
        slots = zip(self._first_slots[first:last].tolist(), self._eos_slots[first:last].tolist(), strict=True)
        for first_slot, eos_slot in slots:
            begin = max(first_slot, start)
            count = min(eos_slot, stop) - begin
            runs.append(PackedRun(begin - start, count, min(eos_slot + 1, stop) - start))
            total += count
        token_start = 0
        if total:
            token_start = int(self._first_tokens[first] + runs[0].start + start - self._first_slots[first])
        return PackedSlice(token_start, token_start + total, runs)

    def documents(self, start: int, stop: int) -> NDArray[np.int64]:
        """Finds whose slots the slots [start, stop) of the stream are; pads belong to the document they pad.

        Args:
            start: First slot.
            stop: One past the last slot, at most `packed_length`.

        Returns:
            [stop - start] number of the document in the shard.
        """
        first = int(self._ends.searchsorted(start, side="right"))
        last = int(self._ends.searchsorted(stop, side="left"))
        ends = np.minimum(self._ends[first : last + 1], stop)
        return np.repeat(np.arange(first, last + 1), np.diff(ends, prepend=start))
