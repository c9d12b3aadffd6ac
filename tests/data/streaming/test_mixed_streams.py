"""Streams of several sources, stages of a run, bad shards."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from data.config import DataConfig
from data.errors import DataError
from data.manifest import read_manifest, write_manifest
from data.streaming.stream import SequenceStream
from tests.data.builders import numbered_documents, write_split

LENGTHS = np.random.default_rng(0).integers(1, 40, 120).tolist()


@pytest.fixture
def corpora(tmp_path: Path) -> Path:
    """web: ids from 1 on; books: ids from 10,000 on, a third of the size."""
    for name, first, lengths in (("web", 0, LENGTHS), ("books", 10_000, LENGTHS[:40])):
        write_split(tmp_path / name, [document + first for document in numbered_documents(lengths)])
    write_split(tmp_path / "web", numbered_documents([90, 50]), split="validation")
    return tmp_path


def open_mixture(corpora: Path, split: str = "train", **settings: object) -> SequenceStream:
    sources = {
        "web": {"path": corpora / "web", "weight": 0.75},
        "books": {"path": corpora / "books", "weight": 0.25, "validation": False},
    }
    minimum = settings.pop("minimum_sequences", 1)
    config = DataConfig(sources=settings.pop("sources", sources), **settings)
    return SequenceStream(config, split, block_length=4, sequence_length=16, minimum_sequences=minimum)


def test_a_mixture_reads_each_source_in_its_own_order(corpora: Path) -> None:
    mixed = open_mixture(corpora)
    read = mixed.read(0, 400)
    for name, weight in (("web", 0.75), ("books", 0.25)):
        rows = [row for row, sample in enumerate(mixed.sample_ids(0, 400)) if sample.source == name]
        assert len(rows) == 400 * weight
        alone = SequenceStream(DataConfig(path=corpora / name), "train", block_length=4, sequence_length=16)
        np.testing.assert_array_equal(read.token_ids[rows], alone.read(0, len(rows)).token_ids)
        assert [s[1:] for s in mixed.sample_ids(0, 400) if s.source == name] == [
            s[1:] for s in alone.sample_ids(0, len(rows))
        ]
    assert {sample.epoch for sample in mixed.sample_ids(0, 400) if sample.source == "books"} > {0}


def test_an_epoch_of_a_mixture_ends_with_its_first_repetition(corpora: Path) -> None:
    mixed = open_mixture(corpora)
    ids = mixed.sample_ids(0, mixed.sequences_per_epoch + 1)
    assert len(set(ids[:-1])) == len(ids) - 1
    assert ids[-1].epoch == 1
    with pytest.raises(DataError, match=r"split of .*books gives \d+ sequences of 16 tokens, at least \d+ are needed"):
        open_mixture(corpora, minimum_sequences=mixed.sequences_per_epoch + 1)


def test_a_stage_goes_on_where_its_sources_stopped(corpora: Path) -> None:
    plain = open_mixture(corpora)
    staged = open_mixture(corpora, stages=[{"from_tokens": 100 * 16, "weights": {"books": 1.0}}])
    assert staged.sample_ids(0, 100) == plain.sample_ids(0, 100)
    books = SequenceStream(DataConfig(path=corpora / "books"), "train", block_length=4, sequence_length=16)
    assert [sample[1:] for sample in staged.sample_ids(100, 30)] == [sample[1:] for sample in books.sample_ids(25, 30)]


def test_validation_reads_each_source_until_it_ends(corpora: Path) -> None:
    write_split(corpora / "books", numbered_documents([16, 11]), split="validation")
    counts = {
        name: SequenceStream(
            DataConfig(path=corpora / name), "validation", block_length=4, sequence_length=16
        ).sequences_per_epoch
        for name in ("web", "books")
    }
    sources = {name: {"path": corpora / name, "weight": weight} for name, weight in (("web", 0.9), ("books", 0.1))}
    stream = open_mixture(corpora, "validation", sources=sources)
    ids = stream.sample_ids(0, stream.sequences_per_epoch)
    assert len(set(ids)) == len(ids) == sum(counts.values())
    # In turn, as long as both have some; the weights do not matter.
    assert sum(sample.source == "books" for sample in ids[: 2 * counts["books"]]) == counts["books"]
    assert {sample.source for sample in ids[2 * counts["books"] :]} == {"web"}
    assert stream.sample_ids(len(ids), 1)[0].epoch == 1


def test_a_stage_begins_with_the_first_whole_sequence_after_its_tokens(corpora: Path) -> None:
    stages = [{"from_tokens": 10 * 16 + 1, "weights": {"books": 1.0}}]
    staged = open_mixture(corpora, stages=stages)
    assert staged.sample_ids(0, 11) == open_mixture(corpora).sample_ids(0, 11)
    assert {sample.source for sample in staged.sample_ids(11, 20)} == {"books"}
    assert "from sequence 11 on: books 1 of 1" in staged.describe()
    assert "from sequence 0 on: books 1 of 4, web 3 of 4" in staged.describe()
    with pytest.raises(DataError, match="from_tokens=164 begins with the same sequence"):
        open_mixture(corpora, stages=[*stages, {"from_tokens": 164, "weights": {"web": 1.0}}])


def test_the_order_in_the_file_does_not_matter(corpora: Path) -> None:
    sources = {
        "books": {"path": corpora / "books", "weight": 0.25, "validation": False},
        "web": {"path": corpora / "web", "weight": 0.75},
    }
    one, two = open_mixture(corpora), open_mixture(corpora, sources=sources)
    assert one.sample_ids(0, 50) == two.sample_ids(0, 50)
    assert two.identity.differences(one.identity, 50) == []
    renamed = {"a" if name == "web" else name: source for name, source in sources.items()}
    words = "the sources from sequence 0 on have other names, which come in another order"
    swapped = open_mixture(corpora, sources={name: {**one, "weight": 1} for name, one in renamed.items()})
    before = open_mixture(corpora, sources={name: {**one, "weight": 1} for name, one in sources.items()})
    assert swapped.identity.differences(before.identity, 50) == [words]


def test_the_same_shards_are_not_mixed_with_themselves(corpora: Path) -> None:
    twice = {"one": {"path": corpora / "web"}, "two": {"path": f"{corpora}/web/"}}
    with pytest.raises(DataError, match="the sources one and two are the same shards; give one of them the weight"):
        open_mixture(corpora, sources=twice)
    twice["two"]["weight"] = 0
    padded = {**twice["two"], "pad_to_block_boundary": False}
    later = [{"from_tokens": 160, "weights": {"two": 1.0}}]
    assert open_mixture(corpora, sources={**twice, "two": padded}, stages=later).sample_ids(10, 1)[0].source == "two"


def test_what_only_a_later_stage_draws_changes_no_past(corpora: Path) -> None:
    plain = {"shuffle": False, "random_left_padding": False}
    before = open_mixture(corpora, **plain)
    write_split(corpora / "new", numbered_documents(LENGTHS[5:]))
    sources = {
        "web": {"path": corpora / "web", "weight": 0.75},
        "books": {"path": corpora / "books", "weight": 0.25, "validation": False},
        "new": {"path": corpora / "new", "weight": 0, "random_left_padding": True, "validation": False},
    }
    later = open_mixture(corpora, sources=sources, stages=[{"from_tokens": 160, "weights": {"new": 1.0}}], **plain)
    assert (before.identity.seed, later.identity.seed) == (None, 0)
    assert later.identity.general_differences(before.identity) == []
    assert later.identity.differences(before.identity, 10) == []


def test_validation_takes_the_sources_that_have_one(corpora: Path) -> None:
    stream = open_mixture(corpora, "validation")
    assert {sample.source for sample in stream.sample_ids(0, stream.sequences_per_epoch)} == {"web"}
    with pytest.raises(DataError, match=r"books has no validation split"):
        open_mixture(corpora, "validation", sources={"books": {"path": corpora / "books"}})


def test_a_change_is_free_in_the_future_and_named_in_the_past(corpora: Path) -> None:
    before = open_mixture(corpora)
    stage = {"from_tokens": 64 * 16, "weights": {"books": 1.0}}
    staged = open_mixture(corpora, stages=[stage])
    assert staged.identity.differences(before.identity, 64) == []
    assert "stages began at sequence 0, and now at 0 and 64" in staged.identity.differences(before.identity, 65)[0]
    assert before.identity.differences(staged.identity, 64) == []
    others = open_mixture(corpora, stages=[{**stage, "weights": {"web": 1.0, "books": 1.0}}])
    assert others.identity.differences(staged.identity, 64) == []
    assert "the shares from sequence 64 on were {'books': 1}" in others.identity.differences(staged.identity, 80)[0]


def test_one_corpus_may_become_the_first_stage_of_a_mixture(corpora: Path) -> None:
    alone = SequenceStream(DataConfig(path=corpora / "web"), "train", block_length=4, sequence_length=16)
    sources = {"old": {"path": corpora / "web"}, "new": {"path": corpora / "books", "weight": 0}}
    later = open_mixture(corpora, sources=sources, stages=[{"from_tokens": 160, "weights": {"new": 1}}])
    assert later.identity.differences(alone.identity, 10) == []


def test_every_difference_is_named(corpora: Path) -> None:
    before = open_mixture(corpora).identity
    for settings, words in (
        ({"seed": 3}, "seed was 0 and is 3"),
        ({"shuffle": False}, "shuffle window shards was 8 and is None"),
        ({"isolate_documents": True}, "isolate documents was False and is True"),
        ({"random_left_padding": False}, "random_left_padding of source web was True and is False"),
    ):
        now = open_mixture(corpora, **settings).identity
        assert any(words in sentence for sentence in [*now.general_differences(before), *now.differences(before, 1)])
    write_split(corpora / "other", numbered_documents(LENGTHS[1:]))
    swapped = {"web": {"path": corpora / "other", "weight": 0.75}, "books": {"path": corpora / "books", "weight": 0.25}}
    (sentence,) = open_mixture(corpora, sources=swapped).identity.differences(before, 1)
    assert sentence.startswith("the shards of source web had the fingerprint")
    assert len(before.model_dump_json()) < 1000


def test_isolation_needs_whole_blocks_of_one_document(corpora: Path) -> None:
    with pytest.raises(
        DataError, match=r"isolate_documents=true needs pad_to_block_boundary=true.* false for books, web"
    ):
        open_mixture(corpora, isolate_documents=True, pad_to_block_boundary=False)
    assert open_mixture(corpora, isolate_documents=True).read(0, 1).documents is not None
    assert open_mixture(corpora).read(0, 1).documents is None


def test_sources_of_different_tokenizers_are_refused(corpora: Path) -> None:
    path = corpora / "books" / "tokenizer.model"
    path.write_bytes(b"another")
    manifest = read_manifest(corpora / "books" / "train")
    fingerprint = hashlib.sha256(b"another").hexdigest()
    write_manifest(corpora / "books" / "train", manifest.model_copy(update={"tokenizer_fingerprint": fingerprint}))
    with pytest.raises(DataError, match=r"source web .* was made with another tokenizer than source books"):
        open_mixture(corpora)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "give either path"),
        ({"path": "a", "sources": {"b": {"path": "b"}}}, "give either path"),
        ({"sources": {"b": {"path": "b", "weight": 0}}}, "all sources have weight 0"),
        ({"path": "a", "stages": [{"from_tokens": 5, "weights": {"x": 1}}]}, "names x, but the sources are corpus"),
        ({"path": "a", "stages": [{"from_tokens": 5, "weights": {"corpus": 0}}]}, "one of them above 0"),
        (
            {"path": "a", "stages": [{"from_tokens": n, "weights": {"corpus": 1}} for n in (5, 5)]},
            "stages must be in order",
        ),
    ],
)
def test_impossible_mixtures_are_explained(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        DataConfig(**settings)


def damage(corpora: Path, change: dict[str, object]) -> None:
    manifest = read_manifest(corpora / "web" / "train")
    shards = (manifest.shards[0].model_copy(update=change), *manifest.shards[1:])
    write_manifest(corpora / "web" / "train", manifest.model_copy(update={"shards": shards}))


@pytest.mark.parametrize(
    ("damaged", "words"),
    [
        ("dtype", "does not hold sample 0 as .* tokens of uint32"),
        ("offsets", "does not hold sample 0"),
        ("vocabulary", "holds the token id .*, its vocabulary has 20"),
        ("missing", "shard-00000.tar is named in the manifest but missing"),
    ],
)
def test_a_bad_shard_ends_the_run_or_is_left_out(corpora: Path, damaged: str, words: str) -> None:
    good = open_mixture(corpora)
    expected, ids = good.read(0, 200), good.sample_ids(0, 200)
    folder = corpora / "web" / "train"
    manifest = json.loads((folder / "manifest.json").read_text())
    if damaged == "dtype":
        manifest["dtype"] = "uint32"
    elif damaged == "offsets":
        manifest["shards"][0]["sample_offsets"][0] += 512
    elif damaged == "vocabulary":
        manifest["vocab_size"] = 20
    else:
        (folder / "shard-00000.tar").unlink()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=words):
        open_mixture(corpora).read(0, 200)
    skipping = open_mixture(corpora, bad_shards="skip")
    skipping.read(0, 200)
    found = skipping.take_found_bad_shards()
    assert skipping.take_found_bad_shards() == {}
    assert all(re.search(words, reason) for reason in found.values())
    assert skipping.take_empty_sequences() == 0, "nothing is left out before all processes know"
    skipping.leave_out(found)
    read = skipping.read(0, 200)
    assert skipping.sample_ids(0, 200) == ids
    assert skipping.take_found_bad_shards() == {}
    empty = ~read.mask.any(axis=1)
    assert skipping.take_empty_sequences() == empty.sum() > 0
    assert skipping.take_empty_sequences() == 0
    np.testing.assert_array_equal(read.mask[~empty], expected.mask[~empty])
    np.testing.assert_array_equal(read.token_ids[~empty], expected.token_ids[~empty])
    assert all(ids[row].source == "web" for row in np.flatnonzero(empty))
    if damaged in ("offsets", "missing"):
        assert {ids[row].shard for row in np.flatnonzero(empty)} == {0}
