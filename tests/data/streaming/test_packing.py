from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data.streaming.packing import PackingSettings, ShardPacking, draw_left_pads
from tests.data.builders import EOS_ID, numbered_documents

SHARD = "5f" * 32
PAD = None

lengths_lists = st.lists(st.integers(1, 30), min_size=1, max_size=20)
settings_objects = st.builds(
    PackingSettings,
    block_length=st.integers(1, 8),
    random_left_padding=st.booleans(),
    pad_to_block_boundary=st.booleans(),
    seed=st.integers(0, 2**63 - 1),
)


def pack_slowly(lengths: list[int], settings: PackingSettings) -> list[int | None]:
    """The definition of packing, one slot after the other; PAD marks masked slots."""
    stream: list[int | None] = []
    pads = draw_left_pads(len(lengths), settings, SHARD).tolist()
    for document, left in zip(numbered_documents(lengths), pads, strict=True):
        stream += [PAD] * left + document.tolist() + [EOS_ID]
        while settings.pad_to_block_boundary and len(stream) % settings.block_length:
            stream.append(PAD)
    return stream


def pack(lengths: list[int], settings: PackingSettings, start: int = 0, stop: int | None = None) -> list[int | None]:
    packing = ShardPacking(np.asarray(lengths), settings, SHARD)
    stop = packing.packed_length if stop is None else stop
    piece = packing.locate(start, stop)
    tokens = np.concatenate(numbered_documents(lengths))[piece.token_start : piece.token_stop]
    slots: list[int | None] = [PAD] * (stop - start)
    unread = tokens.tolist()
    for run in piece.runs:
        assert slots[run.start : run.stop] == [PAD] * (run.stop - run.start)
        assert run.stop - run.start - run.tokens in (0, 1)
        end_of_text = [EOS_ID] * (run.stop - run.start - run.tokens)
        slots[run.start : run.stop] = unread[: run.tokens] + end_of_text
        del unread[: run.tokens]
    assert not unread
    return slots


@given(lengths_lists, settings_objects, st.data())
def test_random_access_equals_sequential_packing(
    lengths: list[int], settings: PackingSettings, data: st.DataObject
) -> None:
    stream = pack_slowly(lengths, settings)
    start = data.draw(st.integers(0, len(stream)))
    stop = data.draw(st.integers(start, len(stream)))
    assert pack(lengths, settings) == stream
    assert pack(lengths, settings, start, stop) == stream[start:stop]


@given(lengths_lists, settings_objects)
def test_counts_of_slots(lengths: list[int], settings: PackingSettings) -> None:
    packing = ShardPacking(np.asarray(lengths), settings, SHARD)
    stream = pack(lengths, settings)
    assert packing.packed_length == len(stream)
    assert packing.padding == stream.count(PAD)
    assert Counter(slot for slot in stream if slot) == Counter(range(1, sum(lengths) + 1))
    assert stream.count(EOS_ID) == len(lengths)


@given(lengths_lists, settings_objects)
def test_each_block_has_a_real_token_and_with_padding_only_one_document(
    lengths: list[int], settings: PackingSettings
) -> None:
    stream = pack(lengths, settings)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    for start in range(0, len(stream), settings.block_length):
        block = stream[start : start + settings.block_length]
        real = [slot for slot in block if slot is not PAD]
        if len(block) == settings.block_length:
            assert real
        if settings.pad_to_block_boundary:
            assert len({int(owner[token - 1]) for token in real if token}) <= 1
            # Nothing real follows an end of text within its block.
            assert EOS_ID not in real[:-1]


def test_end_of_text_survives_in_the_last_slot_of_a_block() -> None:
    settings = PackingSettings(4, random_left_padding=False, pad_to_block_boundary=True, seed=0)
    assert pack([3, 4], settings) == [1, 2, 3, EOS_ID, 4, 5, 6, 7, EOS_ID, PAD, PAD, PAD]


def test_left_pads_are_uniform_and_differ_by_shard_and_seed() -> None:
    documents, block_length = 40_000, 4
    settings = PackingSettings(block_length, random_left_padding=True, pad_to_block_boundary=True, seed=1)
    pads = draw_left_pads(documents, settings, SHARD)
    counts = np.bincount(pads, minlength=block_length)
    assert len(counts) == block_length
    deviation = np.sqrt(documents / block_length * (1 - 1 / block_length))
    assert np.abs(counts - documents / block_length).max() < 5 * deviation
    other_seed = PackingSettings(block_length, random_left_padding=True, pad_to_block_boundary=True, seed=2)
    assert (pads != draw_left_pads(documents, other_seed, SHARD)).any()
    assert (pads != draw_left_pads(documents, settings, "60" * 32)).any()


def test_draws_never_change() -> None:
    """A run that goes on under a later version must see the same sequences."""
    settings = PackingSettings(8, random_left_padding=True, pad_to_block_boundary=True, seed=7)
    assert draw_left_pads(12, settings, SHARD).tolist() == [7, 3, 6, 4, 4, 5, 3, 6, 6, 1, 2, 4]
