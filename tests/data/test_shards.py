import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data.errors import DataError
from data.manifest import MANIFEST_NAME, dtype_for, read_manifest
from data.shard_writer import SAMPLE_TOKENS, ShardWriter
from data.shards import ShardReader, read_document_lengths
from tests.data.builders import numbered_documents, write_shard, write_split


@pytest.fixture
def large_documents() -> list[np.ndarray]:
    """Enough for three samples."""
    generator = np.random.default_rng(0)
    lengths = [SAMPLE_TOKENS // 2, SAMPLE_TOKENS // 2 + 3, 5, SAMPLE_TOKENS, 7]
    return [generator.integers(0, 2**16, length, dtype=np.uint32) for length in lengths]


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_reads_any_range_across_samples(tmp_path: Path, large_documents: list[np.ndarray], dtype: str) -> None:
    record = write_shard(tmp_path, large_documents, dtype)
    assert len(record.sample_tokens) == 3
    everything = np.concatenate(large_documents)
    reader = ShardReader(tmp_path / record.file, record, dtype)
    total, border = len(everything), record.sample_tokens[0]
    ranges = [(0, total), (0, 0), (total, total), (border - 2, border + 2), (border, border + 1), (total - 3, total)]
    for start, stop in ranges:
        np.testing.assert_array_equal(reader.read(start, stop), everything[start:stop])
    assert read_document_lengths(tmp_path, record).tolist() == [len(document) for document in large_documents]


def test_tarfile_and_numpy_read_a_shard(tmp_path: Path, large_documents: list[np.ndarray]) -> None:
    record = write_shard(tmp_path, large_documents)
    with tarfile.open(tmp_path / record.file) as tar:
        members = {member.name: np.load(io.BytesIO(tar.extractfile(member).read())) for member in tar}
    tokens = np.concatenate([array for name, array in members.items() if name.endswith(".tokens.npy")])
    lengths = np.concatenate([array for name, array in members.items() if name.endswith(".doc_lengths.npy")])
    assert tokens.dtype == np.uint16
    np.testing.assert_array_equal(tokens, np.concatenate(large_documents))
    assert lengths.tolist() == [len(document) for document in large_documents]


def test_webdataset_reads_a_shard(tmp_path: Path, large_documents: list[np.ndarray]) -> None:
    """Takes a second or two: webdataset imports torch."""
    import webdataset

    record = write_shard(tmp_path, large_documents)
    dataset = webdataset.WebDataset(str(tmp_path / record.file), shardshuffle=False).decode()
    samples = list(dataset)
    assert [sample["__key__"] for sample in samples] == ["00000-00000", "00000-00001", "00000-00002"]
    found = [
        document
        for sample in samples
        for document in np.split(sample["tokens.npy"], np.cumsum(sample["doc_lengths.npy"])[:-1])
    ]
    for document, expected in zip(found, large_documents, strict=True):
        np.testing.assert_array_equal(document, expected)


def test_equal_documents_give_equal_bytes(tmp_path: Path) -> None:
    documents = numbered_documents([3, 4])
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    assert write_shard(tmp_path / "a", documents) == write_shard(tmp_path / "b", documents)


def test_an_unfinished_shard_has_no_name(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 0, "uint16")
    writer.add(np.arange(9, dtype=np.uint32))
    assert not list(tmp_path.glob("*.tar"))
    writer.abandon()
    assert not list(tmp_path.iterdir())


def test_dtype_holds_every_id() -> None:
    assert dtype_for(2**16) == "uint16"
    assert dtype_for(2**16 + 1) == "uint32"


def test_a_shard_that_shrinks_while_open_is_named(tmp_path: Path) -> None:
    record = write_shard(tmp_path, numbered_documents([5000]))
    reader = ShardReader(tmp_path / record.file, record, "uint16")
    with open(tmp_path / record.file, "r+b") as file:
        file.truncate(4000)
    with pytest.raises(DataError, match=r"shard-00000.tar ends at byte 4000, before its last token"):
        reader.read(0, 5000)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "format version 99, this code reads 1"),
        ({"dtype": "int8"}, "dtype 'int8', only uint16 and uint32 are known"),
        ({"vocab_size": "many"}, "damaged \\(vocab_size"),
        ({"extra": 1}, "damaged \\(extra"),
        ({"shards": []}, "names no shard"),
        ({"eos_id": 2**16}, "eos_id 65536 is outside the vocabulary of 65536"),
        ({"vocab_size": 2**16 + 1}, "dtype uint16 does not hold the ids of a vocabulary of 65537"),
    ],
)
def test_manifests_are_checked(tmp_path: Path, change: dict[str, object], message: str) -> None:
    write_split(tmp_path, numbered_documents([5]))
    path = tmp_path / "train" / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=message):
        read_manifest(tmp_path / "train")
    path.write_text("{")
    with pytest.raises(DataError, match="damaged"):
        read_manifest(tmp_path / "train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample_offsets": []}, r"\(shards.1.sample_offsets: .*at least 1 item"),
        ({"sample_tokens": [60, 60]}, r"\(shards.1: sample_offsets has 1 entries and sample_tokens 2"),
        ({"sample_tokens": [119]}, r"\(shards.1: sample_tokens adds up to 119, tokens is 120"),
        ({"sample_tokens": [-1, 121], "sample_offsets": [1024, 2048]}, r"\(shards.1.sample_tokens.0: .*greater than 0"),
        (
            {"sample_tokens": [60, 60], "sample_offsets": [1024, 512]},
            r"sample_offsets does not rise within the \d+ bytes",
        ),
        ({"sample_offsets": [10**30]}, r"sample_offsets does not rise within the \d+ bytes of shard-00001.tar"),
        ({"sha256": "../secret"}, r"\(shards.1.sha256: "),
        ({"file": "../train/shard-00001.tar"}, r"\(shards.1.file: "),
        ({"file": "shard-00000.tar"}, r"\(the whole file: shard-00000.tar is listed 2 times"),
        ({"lengths_file": "shard-00000.lengths.npy"}, r"shard-00000.lengths.npy is listed 2 times"),
    ],
)
def test_shards_in_manifests_are_checked(tmp_path: Path, change: dict[str, object], message: str) -> None:
    write_split(tmp_path, numbered_documents([120, 120]), shard_tokens=100)
    path = tmp_path / "train" / MANIFEST_NAME
    content = json.loads(path.read_text())
    content["shards"][1] |= change
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"^{path} is damaged .*{message}.*; prepare the data again"):
        read_manifest(tmp_path / "train")


@pytest.mark.parametrize(("dtype", "vocab_size", "token"), [("uint16", 300, 300), ("uint16", None, 2**16)])
def test_a_token_outside_the_vocabulary_is_not_written(
    tmp_path: Path, dtype: str, vocab_size: int | None, token: int
) -> None:
    writer = ShardWriter(tmp_path, 0, dtype, vocab_size)
    writer.add(np.array([1, token], dtype=np.uint32))
    with pytest.raises(DataError, match=f"token id {token} is outside the vocabulary of {token} that .* is made for"):
        writer.finish()
    writer.abandon()
    assert not list(tmp_path.iterdir())
