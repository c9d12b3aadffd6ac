import dataclasses
import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data.config import DataConfig
from data.errors import DataError
from data.manifest import read_manifest
from data.preparation.documents import read_documents
from data.preparation.prepare import PreparationOptions, prepare
from data.shards import ShardReader, read_document_lengths, verify_shards
from data.streaming.stream import SequenceStream
from data.tokenizer import load_tokenizer


@pytest.fixture
def options(corpus_file: Path, sentencepiece_file: Path, tmp_path: Path) -> PreparationOptions:
    return PreparationOptions(
        inputs=(corpus_file,),
        output=tmp_path / "shards",
        tokenizer=sentencepiece_file,
        validation_fraction=0.2,
        shard_tokens=500,
    )


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


def test_shards_hold_every_document_in_order(options: PreparationOptions, corpus_file: Path) -> None:
    summary = prepare(options)
    everything = list(read_documents(corpus_file))
    train, validation = texts(options.output, "train"), texts(options.output, "validation")
    assert train + validation != everything
    assert Counter(train + validation) == Counter(everything)
    for found in (train, validation):
        assert found == [text for text in everything if text in set(found)]
    assert len(summary.manifests["train"].shards) > 3
    sizes = [statistics.text_bytes for statistics in summary.statistics.values()]
    assert sum(sizes) == sum(len(text.encode()) for text in everything)
    assert f"{len(train)} documents" in str(summary)
    assert verify_shards(options.output) == sum(len(manifest.shards) for manifest in summary.manifests.values())
    assert not list(options.output.parent.glob(".*"))


def test_validation_by_fraction_depends_on_the_text_alone(options: PreparationOptions, tmp_path: Path) -> None:
    prepare(options)
    everything = list(read_documents(options.inputs[0]))
    backwards = tmp_path / "backwards.jsonl"
    backwards.write_text("".join(json.dumps({"text": text}) + "\n" for text in reversed(everything)))
    prepare(dataclasses.replace(options, inputs=(backwards,), output=tmp_path / "backwards"))
    chosen = texts(options.output, "validation")
    assert chosen == texts(tmp_path / "backwards", "validation")[::-1]
    assert set(chosen) == {t for t in everything if int(hashlib.sha256(t.encode()).hexdigest(), 16) < 0.2 * 2**256}


def test_two_workers_make_what_one_makes(options: PreparationOptions, tmp_path: Path, tokenizer_json: Path) -> None:
    """Takes over a second: processes start. Batches are many, because the corpus repeats."""
    large = tmp_path / "large.jsonl"
    large.write_bytes(options.inputs[0].read_bytes() * 100)
    for name, tokenizer in (("sentencepiece", options.tokenizer), ("hugging_face", tokenizer_json)):
        made = {}
        for workers in (1, 2):
            output = tmp_path / f"{name}-{workers}"
            inputs = {"inputs": (large,), "validation_inputs": options.inputs, "validation_fraction": 0.0}
            prepare(
                dataclasses.replace(
                    options, **inputs, output=output, tokenizer=tokenizer, workers=workers, shard_tokens=50_000
                )
            )
            made[workers] = files(output)
        assert len(made[1]) > 10
        assert made[1] == made[2]


def test_the_stream_reads_what_was_prepared(options: PreparationOptions) -> None:
    prepare(dataclasses.replace(options, shard_tokens=10**6))
    config = DataConfig(path=options.output, tokenizer=options.tokenizer)
    stream = SequenceStream(config, "validation", block_length=4, sequence_length=32)
    tokenizer = load_tokenizer(stream.tokenizer_path)
    sequences = stream.read(0, stream.sequences_per_epoch)
    read = tokenizer.decode(sequences.token_ids[sequences.mask].tolist())
    stored = "".join(texts(options.output, "validation"))
    assert stored.startswith(read)
    assert len(read) > 0.9 * len(stored)


def test_the_same_again_does_nothing(options: PreparationOptions, tmp_path: Path) -> None:
    first = prepare(options)
    before = files(options.output)
    again = prepare(dataclasses.replace(options, workers=2))
    assert again.already_prepared
    assert not first.already_prepared
    assert again.statistics == first.statistics
    assert again.manifests == first.manifests
    assert str(again).startswith("already prepared")
    # Elsewhere, under the same name, the input is still the same input.
    moved = tmp_path / "moved" / options.inputs[0].name
    moved.parent.mkdir()
    moved.write_bytes(options.inputs[0].read_bytes())
    assert prepare(dataclasses.replace(options, inputs=(moved,))).already_prepared
    assert files(options.output) == before


def test_other_content_is_not_overwritten(options: PreparationOptions, tmp_path: Path, tokenizer_json: Path) -> None:
    prepare(options)
    before = files(options.output)
    changed = tmp_path / options.inputs[0].name
    changed.write_bytes(options.inputs[0].read_bytes().replace(b"river", b"brook", 1))
    for change, field in (
        ({"inputs": (changed,)}, "inputs"),
        ({"tokenizer": tokenizer_json}, "tokenizer_fingerprint"),
        ({"validation_fraction": 0.3}, "validation_fraction"),
        ({"shard_tokens": 400}, "shard_tokens"),
    ):
        with pytest.raises(DataError, match=rf"prepared from something else \({field} differ\); give another --output"):
            prepare(dataclasses.replace(options, **change))
    assert files(options.output) == before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "mine.txt").touch()
    with pytest.raises(DataError, match="exists and was not made by this command"):
        prepare(dataclasses.replace(options, output=foreign))
    assert [path.name for path in foreign.iterdir()] == ["mine.txt"]


def test_a_shard_lost_later_is_noticed(options: PreparationOptions) -> None:
    prepare(options)
    (options.output / "train" / "shard-00001.tar").unlink()
    with pytest.raises(DataError, match=r"shard-00001.tar is named in the manifest but missing"):
        prepare(options)


def test_an_empty_output_directory_is_fine(options: PreparationOptions) -> None:
    options.output.mkdir()
    assert not prepare(options).already_prepared


def test_a_bad_input_leaves_nothing(options: PreparationOptions, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "good"}\n{"text"')
    with pytest.raises(DataError, match=r"bad.jsonl, line 2"):
        prepare(dataclasses.replace(options, inputs=(bad,)))
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": ()}, "no input file was given"),
        ({"validation_fraction": 1.0}, "--validation-fraction 1.0 must be"),
        ({"validation_fraction": 1e-9}, "no document went to the validation split"),
        ({"workers": 0}, "--workers 0 must be"),
        ({"shard_tokens": 0}, "--shard-tokens 0 must be"),
        ({"output": Path("/dev/null/shards")}, "/dev/null.*: Not a directory"),
    ],
)
def test_bad_options(options: PreparationOptions, change: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepare(dataclasses.replace(options, **change))
    with pytest.raises(DataError, match="exclude each other"):
        prepare(dataclasses.replace(options, validation_inputs=options.inputs))
