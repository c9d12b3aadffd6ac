import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data.errors import DataError
from data.files import sha256_of_file
from data.inspection.comparison import compare_corpora
from data.inspection.corpus import CorpusSplit
from data.inspection.show import describe_documents
from data.inspection.statistics import describe_corpus
from data.inspection.verification import verify_corpus
from data.manifest import read_manifest, write_manifest
from data.preparation.prepare import PreparationOptions, prepare
from tests.data.builders import numbered_documents, write_split

LENGTHS = np.random.default_rng(3).integers(1, 40, 60).tolist()


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_split(tmp_path / "corpus", numbered_documents(LENGTHS))
    write_split(tmp_path / "corpus", numbered_documents([30, 20]), split="validation")
    return tmp_path / "corpus"


def test_documents_come_back_as_they_were_written(corpus: Path) -> None:
    split = CorpusSplit(corpus, "train")
    found = [tokens for record in split.manifest.shards for tokens in split.documents(record)]
    for tokens, expected in zip(found, numbered_documents(LENGTHS), strict=True):
        np.testing.assert_array_equal(tokens, expected)
    (last,) = split.documents(split.shard(0), first=1, count=1)
    np.testing.assert_array_equal(last, numbered_documents(LENGTHS)[1])
    with pytest.raises(DataError, match=r"--shard 99: .* has the shards 0 to \d+"):
        split.shard(99)
    with pytest.raises(DataError, match=r"--first 99: .*shard-00000.tar has documents 0 to \d+"):
        next(split.documents(split.shard(0), first=99))


def test_documents_are_shown_as_text(tmp_path: Path, sentencepiece_file: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("the river under a stone. " * 30)
    prepare(PreparationOptions(inputs=(text,), output=tmp_path / "shards", tokenizer=sentencepiece_file))
    shown = describe_documents(tmp_path / "shards", "train", 0, 0, 1, 24).splitlines()
    assert shown[0].startswith("--- train shard 0, document 0: ")
    assert shown[1] == "the river under a stone. ..."
    whole = describe_documents(tmp_path / "shards", "train", 0, 0, 1, 0)
    assert whole.partition("\n")[2] == text.read_text()


def test_statistics_name_the_numbers(corpus: Path) -> None:
    described = describe_corpus(corpus, 4, 16)
    assert f"train: 60 documents, {sum(LENGTHS):,} tokens of uint16" in described
    assert "validation: 2 documents, 50 tokens" in described
    assert f"0% {min(LENGTHS)}, " in described
    assert f"100% {max(LENGTHS)}" in described
    assert "with padding to blocks of 4: " in described
    assert "without padding to blocks of 4: " in described
    assert "0.00% padding" in described.splitlines()[-1]


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_an_intact_corpus_is_found_intact(corpus: Path) -> None:
    found = verify_corpus(corpus)
    assert found.problems == ()
    assert found.shards == len(read_manifest(corpus / "train").shards) + 1


def test_every_damage_is_found(corpus: Path) -> None:
    train = corpus / "train"
    flip(train / "shard-00000.tar", 700)
    flip(train / "shard-00001.lengths.npy", 130)
    (train / "shard-00002.tar").unlink()
    with open(train / "shard-00003.tar", "ab") as tar:
        tar.write(b"more")
    flip(corpus / "tokenizer.model", 0)
    found = verify_corpus(corpus)
    for words in ("00000.tar has checksum", "00001.lengths.npy has checksum", "00002.tar is named in the manifest but"):
        assert sum(words in problem for problem in found.problems) == 1
    assert any("shard-00003.tar has" in problem and "bytes" in problem for problem in found.problems)
    assert sum("tokenizer.model has checksum" in problem for problem in found.problems) == 2, "once for each split"
    assert len(found.problems) == 6
    with pytest.raises(DataError, match="neither train/ nor validation/"):
        verify_corpus(train)


def test_a_manifest_that_contradicts_its_shards_is_found(corpus: Path) -> None:
    manifest = read_manifest(corpus / "train")
    sidecar = corpus / "train" / manifest.shards[0].lengths_file
    content = sidecar.read_bytes()
    np.save(sidecar, np.load(sidecar)[::-1])
    changes: list[dict[str, object]] = [{"lengths_sha256": sha256_of_file(sidecar)}, {}]
    changes[1]["sample_offsets"] = (manifest.shards[1].sample_offsets[0] + 512,)
    shards = [record.model_copy(update=change) for record, change in zip(manifest.shards, changes, strict=False)]
    write_manifest(corpus / "train", manifest.model_copy(update={"shards": (*shards, *manifest.shards[2:])}))
    first, second = verify_corpus(corpus).problems
    assert "shard-00000.tar holds other documents than shard-00000.lengths.npy says" in first
    assert "shard-00001.tar holds its samples elsewhere than its manifest says" in second
    sidecar.write_bytes(content)
    write_manifest(corpus / "train", manifest.model_copy(update={"vocab_size": 50}))
    problems = verify_corpus(corpus).problems
    assert all("its vocabulary has 50" in problem for problem in problems)
    assert len(problems) == len([s for s in np.cumsum([s.tokens for s in manifest.shards]) if s >= 50])


def test_what_cannot_be_read_hides_nothing_else(corpus: Path) -> None:
    """Neither a damaged manifest nor a tar that is none, though its checksum is right."""
    manifest = read_manifest(corpus / "train")
    tar = corpus / "train" / "shard-00001.tar"
    tar.write_bytes(b"no tar".ljust(tar.stat().st_size))
    second = manifest.shards[1].model_copy(update={"sha256": sha256_of_file(tar)})
    shards = (manifest.shards[0], second, *manifest.shards[2:])
    write_manifest(corpus / "train", manifest.model_copy(update={"shards": shards}))
    (corpus / "validation" / "manifest.json").write_text("{}")
    found = verify_corpus(corpus)
    assert found.shards == len(shards)
    damaged, none = found.problems
    assert f"{corpus / 'validation' / 'manifest.json'} is damaged" in damaged
    assert f"{tar} is no tar of documents" in none


@pytest.mark.parametrize(
    ("block_length", "sequence_length", "message"),
    [
        (4, 0, "^--sequence-length 0 must be from 1 to"),
        (-4, 16, "^--block-length -4 must be from 1 to --sequence-length 16$"),
        (0, 16, "^--block-length 0 must"),
        (10**30, 10**30, "^--sequence-length 10{30} must"),
    ],
)
def test_impossible_lengths_are_named(corpus: Path, block_length: int, sequence_length: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        describe_corpus(corpus, block_length, sequence_length)


def test_corpora_are_compared(corpus: Path, tmp_path: Path) -> None:
    documents = numbered_documents(LENGTHS)
    shutil.copytree(corpus, tmp_path / "copy")
    text, same = compare_corpora(corpus, tmp_path / "copy")
    assert same
    assert text.count("the same shards, made with the same tokenizer") == 2

    write_split(tmp_path / "resharded", documents, shard_tokens=90)
    shutil.copytree(corpus / "validation", tmp_path / "resharded" / "validation")
    text, same = compare_corpora(corpus, tmp_path / "resharded")
    assert same
    assert "the same documents in the same order, in other shards" in text

    write_split(tmp_path / "reversed", documents[::-1])
    text, same = compare_corpora(corpus, tmp_path / "reversed")
    assert not same
    assert "the same documents in another order" in text
    assert f"validation: only in {corpus}" in text

    write_split(tmp_path / "other", [*documents[3:], documents[10], np.array([7, 7])])
    text, same = compare_corpora(corpus, tmp_path / "other")
    assert not same
    assert "3 are only in the first and 2 only in the second" in text


def test_corpora_of_other_tokenizers_are_not_compared(corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus, tmp_path / "other")
    for split in ("train", "validation"):
        manifest = read_manifest(corpus / split)
        write_manifest(tmp_path / "other" / split, manifest.model_copy(update={"tokenizer_fingerprint": "x"}))
    text, same = compare_corpora(corpus, tmp_path / "other")
    assert not same
    assert text.count("made with different tokenizers") == 2


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        ("tokens.npy", "holds its samples elsewhere than its manifest says"),
        ("doc_lengths.npy", "holds other documents than shard-00000.lengths"),
    ],
)
def test_a_tar_with_a_missing_member_is_found(corpus: Path, lost: str, words: str) -> None:
    """Also if somebody has written the new size and checksum into the manifest."""
    path = corpus / "train" / "shard-00000.tar"
    content = io.BytesIO()
    with tarfile.open(path) as tar, tarfile.open(fileobj=content, mode="w") as shorter:
        for member in tar:
            if not member.name.endswith(lost):
                shorter.addfile(member, tar.extractfile(member))
    path.write_bytes(content.getvalue())
    assert any(str(path) in problem for problem in verify_corpus(corpus).problems)
    manifest = json.loads((corpus / "train" / "manifest.json").read_text())
    manifest["shards"][0] |= {"bytes": len(content.getvalue()), "sha256": sha256_of_file(path)}
    (corpus / "train" / "manifest.json").write_text(json.dumps(manifest))
    problems = verify_corpus(corpus).problems
    assert any(words in problem for problem in problems), problems
    if lost == "tokens.npy":
        with pytest.raises(DataError, match="does not hold sample 0 as"):
            next(CorpusSplit(corpus, "train").documents(read_manifest(corpus / "train").shards[0]))
