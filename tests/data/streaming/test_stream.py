from pathlib import Path

import numpy as np
import pytest

from data.config import DataConfig
from data.errors import DataError
from data.inspection.verification import verify_corpus
from data.manifest import Manifest, read_manifest
from data.streaming.packing import PackingSettings, draw_left_pads
from data.streaming.stream import SequenceStream
from tests.data.builders import EOS_ID, numbered_documents, write_split

LENGTHS = np.random.default_rng(0).integers(1, 40, 300).tolist()


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """About thirty shards for training and one for validation."""
    write_split(tmp_path, numbered_documents(LENGTHS))
    write_split(tmp_path, numbered_documents([50, 60, 30]), split="validation", shard_tokens=1000)
    return tmp_path


def open_stream(path: Path, split: str = "train", minimum_sequences: int = 1, **settings: object) -> SequenceStream:
    lengths = {"block_length": 4, "sequence_length": 16}
    lengths |= {name: settings.pop(name) for name in tuple(lengths) if name in settings}
    return SequenceStream(DataConfig(path=path, **settings), split, minimum_sequences=minimum_sequences, **lengths)


def real_tokens(stream: SequenceStream, position: int, count: int) -> list[int]:
    sequences = stream.read(position, count)
    return sequences.token_ids[sequences.mask].tolist()


def test_shapes_types_and_pads(prepared: Path) -> None:
    stream = open_stream(prepared)
    sequences = stream.read(5, 7)
    assert sequences.token_ids.shape == sequences.mask.shape == (7, 16)
    assert sequences.token_ids.dtype == np.int64
    assert sequences.mask.dtype == np.bool_
    assert not sequences.mask.all()
    assert (sequences.token_ids[~sequences.mask] == stream.eos_id).all()
    assert stream.vocab_size == 2**16
    assert stream.eos_id == EOS_ID


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("padding", [True, False])
def test_an_epoch_is_every_shard_packed_and_cut(prepared: Path, shuffle: bool, padding: bool) -> None:
    """So every token comes once, but those in the tails of shards; every end of text is real and every pad is not."""
    stream = open_stream(
        prepared, shuffle=shuffle, random_left_padding=padding, pad_to_block_boundary=padding, shuffle_window_shards=4
    )
    expected, tail_slots = pack_slowly(prepared, padding)
    for epoch in (0, 1):
        position = epoch * stream.sequences_per_epoch
        sequences = stream.read(position, stream.sequences_per_epoch)
        rows = np.where(sequences.mask, sequences.token_ids, -1).tolist()
        samples = stream.sample_ids(position, stream.sequences_per_epoch)
        found = {(sample.shard, sample.sequence): row for sample, row in zip(samples, rows, strict=True)}
        assert len(found) == stream.sequences_per_epoch
        assert found == expected
    assert f"{tail_slots:,} slots dropped" in stream.describe()


def pack_slowly(path: Path, padding: bool) -> tuple[dict[tuple[int, int], list[int]], int]:
    """Sequences of 16 slots by shard and number, and the slots in the tails; -1 marks pads."""
    settings = PackingSettings(4, padding, padding, 0)
    documents = iter(numbered_documents(LENGTHS))
    rows: dict[tuple[int, int], list[int]] = {}
    tail_slots = 0
    for number, shard in enumerate(read_manifest(path / "train").shards):
        packed: list[int] = []
        for left in draw_left_pads(shard.documents, settings, shard.sha256).tolist():
            packed += [-1] * left + next(documents).tolist() + [EOS_ID]
            while padding and len(packed) % 4:
                packed.append(-1)
        rows |= {(number, row): packed[16 * row : 16 * row + 16] for row in range(len(packed) // 16)}
        tail_slots += len(packed) % 16
    return rows, tail_slots


def test_ranks_together_read_what_one_rank_reads(prepared: Path) -> None:
    one = open_stream(prepared)
    whole = one.read(0, 96)
    for ranks, batch in ((2, 8), (3, 4), (4, 2)):
        streams = [open_stream(prepared) for _ in range(ranks)]
        parts = [
            streams[rank].read(step * ranks * batch + rank * batch, batch)
            for step in range(96 // (ranks * batch))
            for rank in range(ranks)
        ]
        np.testing.assert_array_equal(np.concatenate([part.token_ids for part in parts]), whole.token_ids)
        np.testing.assert_array_equal(np.concatenate([part.mask for part in parts]), whole.mask)


def test_reading_runs_on_into_the_next_epoch(prepared: Path) -> None:
    stream = open_stream(prepared)
    end = stream.sequences_per_epoch
    across = stream.read(end - 2, 4).token_ids
    np.testing.assert_array_equal(across[:2], stream.read(end - 2, 2).token_ids)
    np.testing.assert_array_equal(across[2:], stream.read(end, 2).token_ids)
    assert [sample.epoch for sample in stream.sample_ids(end - 2, 4)] == [0, 0, 1, 1]
    assert (stream.read(0, end).token_ids != stream.read(end, end).token_ids).any()


def test_validation_comes_in_order(prepared: Path) -> None:
    stream = open_stream(prepared, "validation", random_left_padding=False)
    tokens = [token for token in real_tokens(stream, 0, stream.sequences_per_epoch) if token != EOS_ID]
    assert tokens == list(range(1, len(tokens) + 1))
    assert stream.sample_ids(0, 3) == [("corpus", 0, 0, 0), ("corpus", 0, 0, 1), ("corpus", 0, 0, 2)]


def test_the_identity_tells_what_matters(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    base = open_stream(prepared).identity
    copy = tmp_path_factory.mktemp("copy")
    write_split(copy, numbered_documents(LENGTHS))
    assert open_stream(copy).identity == base
    changed = [
        open_stream(prepared, block_length=2),
        open_stream(prepared, sequence_length=32),
        open_stream(prepared, random_left_padding=False),
        open_stream(prepared, pad_to_block_boundary=False),
        open_stream(prepared, shuffle=False),
        open_stream(prepared, shuffle_window_shards=2),
        open_stream(prepared, seed=1),
        open_stream(prepared, "validation"),
    ]
    assert (
        len({identity.model_dump_json() for identity in (base, *(stream.identity for stream in changed))})
        == len(changed) + 1
    )
    # Without shuffling and random pads the seed has no effect.
    still = {"shuffle": False, "random_left_padding": False}
    assert open_stream(prepared, seed=1, **still).identity == open_stream(prepared, seed=2, **still).identity


def test_opening_again_and_seeking_read_no_shard(prepared: Path) -> None:
    before = open_stream(prepared).sample_ids(0, 50)
    for path in (prepared / "train").glob("shard-*"):
        path.chmod(0o644)
        path.write_bytes(bytes(path.stat().st_size))
    assert open_stream(prepared).sample_ids(0, 50) == before
    assert "checksum" in verify_corpus(prepared).problems[0]
    with pytest.raises(DataError, match=r"document lengths .* are not those of \d+ documents"):
        open_stream(prepared, seed=1)


def test_a_damaged_count_table_is_made_anew(prepared: Path) -> None:
    before = open_stream(prepared).sample_ids(0, 50)
    (table,) = (prepared / "counts").glob("*.json")
    good = table.read_bytes()
    for content in (b"", good[: len(good) // 2], good.replace(b"[", b"[16,", 1)):
        table.write_bytes(content)
        assert open_stream(prepared).sample_ids(0, 50) == before
        assert table.read_bytes() == good


def test_the_count_table_of_unwritable_data_goes_to_the_cache(
    prepared: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_stream(prepared).sample_ids(0, 50)
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    for table in (prepared / "counts").iterdir():
        table.unlink()
    (prepared / "counts").rmdir()
    (prepared / "counts").touch()  # Unwritable for everybody, also for root.
    assert open_stream(prepared).sample_ids(0, 50) == before
    assert len(list(cache.rglob("counts-*.json"))) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert open_stream(prepared).sample_ids(0, 50) == before


def test_description_names_the_numbers(prepared: Path) -> None:
    stream = open_stream(prepared)
    description = stream.describe()
    assert "300 documents" in description
    assert f"{sum(LENGTHS):,} tokens" in description
    assert f"{stream.sequences_per_epoch:,} sequences of 16" in description


def resize(path: Path, change: int) -> tuple[int, int]:
    size = path.stat().st_size
    path.chmod(0o644)
    with open(path, "r+b") as file:
        file.truncate(size + change)
    return size, size + change


@pytest.mark.parametrize(("name", "change"), [("shard-00002.tar", -512), ("shard-00000.lengths.npy", 1)])
def test_a_file_of_another_size_is_named(prepared: Path, name: str, change: int) -> None:
    expected, actual = resize(prepared / "train" / name, change)
    with pytest.raises(DataError, match=f"{name} has {actual} bytes, the manifest says {expected}; prepare"):
        open_stream(prepared).check_files()


def test_a_missing_shard_is_named(prepared: Path) -> None:
    (prepared / "train" / "shard-00001.tar").unlink()
    with pytest.raises(DataError, match=r"shard-00001.tar is named in the manifest but missing"):
        open_stream(prepared).check_files()


def test_missing_parts_are_named(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(DataError, match=r"data.path .*nowhere does not exist; make it with tools/prepare_data.py"):
        open_stream(prepared / "nowhere")
    only_training = tmp_path_factory.mktemp("only_training")
    write_split(only_training, numbered_documents([99]))
    with pytest.raises(DataError, match=r"has no validation split.*--validation-input"):
        open_stream(only_training, "validation")
    (prepared / "train" / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"train/manifest.json is missing; prepare it"):
        open_stream(prepared)


def test_too_few_sequences(prepared: Path) -> None:
    with pytest.raises(DataError, match=r"validation split .* gives 9 sequences of 16 tokens, at least 100 are needed"):
        open_stream(prepared, "validation", minimum_sequences=100)
    with pytest.raises(DataError, match="gives 0 sequences of 4096 tokens, at least 1"):
        open_stream(prepared, "validation", sequence_length=4096)


def test_sequence_length_must_be_whole_blocks(prepared: Path) -> None:
    with pytest.raises(DataError, match="sequence length 18 is no multiple of block length 4"):
        open_stream(prepared, sequence_length=18)


def test_another_tokenizer_is_refused(prepared: Path, tmp_path: Path) -> None:
    manifest: Manifest = read_manifest(prepared / "train")
    other = tmp_path / "other.model"
    other.write_bytes(b"other")
    with pytest.raises(DataError, match=f"fingerprint d9298a10[0-9a-f]+, but .* {manifest.tokenizer_fingerprint}"):
        open_stream(prepared, tokenizer=other)
    assert open_stream(prepared, tokenizer=prepared / "tokenizer.model").tokenizer_path == prepared / "tokenizer.model"
    with pytest.raises(DataError, match=r"tokenizer .*absent.model does not exist"):
        open_stream(prepared, tokenizer=tmp_path / "absent.model")


@pytest.mark.parametrize("block_length", [1, 2, 4, 8])
def test_the_same_shards_serve_every_block_and_sequence_length(tmp_path: Path, block_length: int) -> None:
    """From 2,048 to 32,768 tokens: whatever the cut, the same tokens in the same order, but for the tails of shards."""
    lengths = np.random.default_rng(1).integers(1, 3000, 200).tolist()
    write_split(tmp_path, numbered_documents(lengths), shard_tokens=100_000, vocab_size=2**19)
    packed: list[np.ndarray] = []
    for sequence_length in (2048, 4096, 8192, 16_384, 32_768):
        stream = open_stream(tmp_path, shuffle=False, block_length=block_length, sequence_length=sequence_length)
        read = stream.read(0, stream.sequences_per_epoch)
        assert read.token_ids.shape == (stream.sequences_per_epoch, sequence_length)
        shards = [sample.shard for sample in stream.sample_ids(0, stream.sequences_per_epoch)]
        first = np.where(read.mask, read.token_ids, -1)[np.asarray(shards) == 0].ravel()
        packed.append(first)
        assert len(first) >= 65_536
    assert all(np.array_equal(packed[0][: len(other)], other) for other in packed[1:])
    assert len(list((tmp_path / "counts").glob("*.json"))) == 1, "one table for all sequence lengths"
