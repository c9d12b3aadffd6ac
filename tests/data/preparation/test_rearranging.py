"""Duplicates and shuffling, through the whole preparation; its second run is killed wherever that can hurt."""

import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.manifest import ShardRecord
from data.preparation.duplicates import HashFile, find_kept
from data.preparation.intermediate import HASHES, IntermediateWriter, random_keys
from data.preparation.prepare import PreparationOptions, prepare
from data.preparation.records import PreparationSummary
from tests.data.builders import intact_shards
from tests.data.preparation.reading import files, texts

WORDS = st.lists(st.sampled_from(["the", "river", "a stone", "42", "light", "é"]), min_size=1, max_size=12)
# A run brings something to the disk about a hundred times; with 1, it is killed at each of them, which takes a minute.
POINTS_APART = 9
DOCUMENTS = st.lists(WORDS.map(" ".join), min_size=1, max_size=40)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def write_corpus(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def prepare_texts(
    folder: Path, tokenizer: Path, train: list[str], validation: list[str], **options: object
) -> tuple[PreparationSummary, list[str], list[str]]:
    """Prepares two splits; gives the summary and what is stored in both."""
    values = PreparationOptions(
        inputs=(write_corpus(folder / "train.jsonl", train),),
        validation_inputs=(write_corpus(folder / "validation.jsonl", validation),),
        output=folder / "shards",
        tokenizer=tokenizer,
        shard_tokens=20,
    )
    summary = prepare(replace(values, **options))  # type: ignore[arg-type]
    return summary, texts(folder / "shards", "train"), texts(folder / "shards", "validation")


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(train=DOCUMENTS, validation=DOCUMENTS, seed=st.integers(0, 2**63))
def test_a_shuffle_is_a_permutation(
    sentencepiece_file: Path, train: list[str], validation: list[str], seed: int
) -> None:
    with temporary_folder() as folder:
        summary, found, found_validation = prepare_texts(
            folder, sentencepiece_file, train, validation, shuffle_documents=seed
        )
        assert sorted(found) == sorted(train)
        assert sorted(found_validation) == sorted(validation)
        assert summary.statistics["train"].text_bytes == sum(len(text.encode()) for text in train)
        intact_shards(folder / "shards")


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(train=DOCUMENTS, validation=DOCUMENTS, shuffle=st.booleans(), partition=st.integers(1, 50))
def test_duplicates_leave_the_first_and_validation_wins(
    sentencepiece_file: Path, train: list[str], validation: list[str], shuffle: bool, partition: int
) -> None:
    train.append("only here")
    expected_validation = list(dict.fromkeys(validation))
    expected = [text for text in dict.fromkeys(train) if text not in set(validation)]
    order = sorted if shuffle else list
    with temporary_folder() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.preparation.duplicates.PARTITION_DOCUMENTS", partition)
        summary, found, found_validation = prepare_texts(
            folder,
            sentencepiece_file,
            train,
            validation,
            remove_duplicates=True,
            shuffle_documents=7 if shuffle else None,
        )
        assert order(found) == order(expected)
        assert order(found_validation) == order(expected_validation)
        rejected = len(train) + len(validation) - len(expected) - len(expected_validation)
        assert summary.rejected.get("duplicate", 0) == rejected
        assert summary.statistics["train"].text_bytes == sum(len(text.encode()) for text in expected)
        assert summary.statistics["train"].tokens == summary.manifests["train"].tokens
        if not shuffle:
            assert all(shard.tokens >= 20 for shard in summary.manifests["train"].shards[:-1])


def test_without_duplicates_nothing_changes(sentencepiece_file: Path, tmp_path: Path) -> None:
    """Removing none in the order of the input writes the same shards as one phase."""
    documents = [f"document {number} of the river" for number in range(100)]
    for name, options in (("one", {}), ("two", {"remove_duplicates": True})):
        (tmp_path / name).mkdir()
        prepare_texts(tmp_path / name, sentencepiece_file, documents, documents[:1], **options)
    one, two = (files(tmp_path / name / "shards" / "validation") for name in ("one", "two"))
    assert one == two
    assert len(files(tmp_path / "one" / "shards" / "train")) > 50


def test_a_shuffle_mixes_the_whole_corpus(sentencepiece_file: Path, tmp_path: Path) -> None:
    """Ranks before and after are as unrelated as those of a random permutation; other seeds give other orders."""
    documents = [str(number) for number in range(2000)]
    orders = []
    for seed in (1, 2):
        (tmp_path / str(seed)).mkdir()
        _, found, _ = prepare_texts(
            tmp_path / str(seed), sentencepiece_file, documents, ["a"], shuffle_documents=seed, shard_tokens=1000
        )
        order = np.array([int(text) for text in found])
        assert (np.sort(order) == np.arange(2000)).all()
        orders.append(order)
        # Standard deviation 1 / sqrt(2000) = 0.022.
        assert abs(np.corrcoef(order, np.arange(2000))[0, 1]) < 0.1
        assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.1
        assert np.mean(np.abs(np.diff(order)) == 1) < 0.01
    assert abs(np.corrcoef(*orders)[0, 1]) < 0.1


def test_intermediate_shards_are_bounded_by_documents(
    sentencepiece_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever their number, the result is complete; in the order of the input it is the same."""
    documents = [f"document {number}" for number in range(50)]
    made = {}
    finished = 0
    finish = IntermediateWriter.finish

    def count_and_finish(writer: IntermediateWriter) -> ShardRecord:
        nonlocal finished
        finished += 1
        return finish(writer)

    monkeypatch.setattr(IntermediateWriter, "finish", count_and_finish)
    for maximum, expected in ((1000, 2), (7, 9)):
        monkeypatch.setattr("data.preparation.intermediate.MAXIMUM_DOCUMENTS", maximum)
        for shuffle in (None, 1):
            folder = tmp_path / f"{maximum}-{shuffle}"
            folder.mkdir()
            options = {"shuffle_documents": shuffle, "remove_duplicates": True, "shard_tokens": 10_000}
            _, found, _ = prepare_texts(folder, sentencepiece_file, documents, ["a"], **options)
            assert sorted(found) == sorted(documents)
            assert finished == expected
            finished = 0
        made[maximum] = files(tmp_path / f"{maximum}-None" / "shards")
    assert made[1000] == made[7]


def test_shuffle_keys_never_change() -> None:
    assert random_keys(3, (1, 2), 2).tolist() == [13722265320738847489, 11416828915044783153]


def test_hashes_that_agree_in_one_half_are_no_duplicates(tmp_path: Path) -> None:
    rows = np.zeros(4, HASHES)
    rows["high"], rows["low"], rows["rank"], rows["index"] = [1, 1, 1, 2], [5, 5, 6, 5], [2, 3, 1, 0], [0, 1, 2, 3]
    np.save(tmp_path / "a.npy", rows)
    find_kept([HashFile(tmp_path / "a.npy", 4), HashFile(tmp_path / "a.npy", 4)], tmp_path / "kept.npy", 1)
    assert np.load(tmp_path / "kept.npy").tolist() == [True, False, True, True, False, False, False, False]


def kill_at(count: int, options: PreparationOptions) -> bool:
    """Prepares in a child that is killed when it brings something to the disk for the given time, before or after."""
    child = os.fork()
    if child == 0:
        left = count
        real = os.fsync

        def fsync(descriptor: int) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            real(descriptor)

        os.fsync = fsync
        try:
            prepare(options)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("second_phase", [False, True])
def test_killed_anywhere_the_output_is_the_same(
    corpus_file: Path, sentencepiece_file: Path, tmp_path: Path, second_phase: bool
) -> None:
    """A run is killed once, at any point; then one run is killed again and again."""
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "the river"}\n{\n{"text": "a"}\n' + corpus_file.read_text()[:8000].rpartition("\n")[0])
    validation = write_corpus(tmp_path / "validation.jsonl", ["the river", "light"] * 30)
    options = PreparationOptions(
        inputs=(corpus_file, bad),
        validation_inputs=(validation,),
        output=tmp_path / "whole",
        tokenizer=sentencepiece_file,
        shard_tokens=600,
        on_malformed="skip",
        min_tokens=2,
        remove_duplicates=second_phase,
        shuffle_documents=5 if second_phase else None,
    )
    summary = prepare(options)
    whole = files(tmp_path / "whole")
    assert summary.rejected["malformed JSON"] == 1
    assert len(whole) > 20
    point = 1
    while kill_at(point, replace(options, output=tmp_path / "scratch")):
        again = prepare(replace(options, output=tmp_path / "scratch"))
        assert files(tmp_path / "scratch") == whole, f"killed at {point}"
        assert again.statistics == summary.statistics
        shutil.rmtree(tmp_path / "scratch")
        point += POINTS_APART
    assert point > 40
    many = replace(options, output=tmp_path / "many")
    kills = 0
    while kill_at(20, many):
        kills += 1
    assert kills > 2
    assert files(tmp_path / "many") == whole
