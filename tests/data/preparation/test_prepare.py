import dataclasses
import gzip
import hashlib
import json
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from data.config import DataConfig
from data.errors import DataError
from data.preparation import tokenizing
from data.preparation.chunks import Chunk
from data.preparation.documents import read_documents
from data.preparation.prepare import PreparationOptions, prepare
from data.preparation.records import REJECTED_NAME
from data.streaming.stream import SequenceStream
from data.tokenizer import Tokenizer, _SentencePieceTokenizer, load_tokenizer
from tests.data.builders import intact_shards
from tests.data.preparation.reading import files, texts


@pytest.fixture
def options(corpus_file: Path, sentencepiece_file: Path, tmp_path: Path) -> PreparationOptions:
    return PreparationOptions(
        inputs=(corpus_file,),
        output=tmp_path / "shards",
        tokenizer=sentencepiece_file,
        validation_fraction=0.2,
        shard_tokens=500,
    )


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
    assert intact_shards(options.output) == sum(len(manifest.shards) for manifest in summary.manifests.values())
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


@pytest.mark.slow
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
        ({"min_tokens": 1}, "min_tokens"),
        ({"shuffle_documents": 0}, "shuffle_documents"),
        ({"remove_duplicates": True}, "remove_duplicates"),
    ):
        with pytest.raises(DataError, match=rf"made from something else \({field} differ\); give another --output"):
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
        ({"min_tokens": -1}, "--min-tokens -1 must be"),
        ({"shuffle_documents": -1}, "--shuffle-documents -1 must be"),
        ({"output": Path("/dev/null/shards")}, "/dev/null.*: Not a directory"),
        ({"output": Path("/")}, "output / is the root of the file system; give a directory in it"),
    ],
)
def test_bad_options(options: PreparationOptions, change: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepare(dataclasses.replace(options, **change))
    assert not list(options.output.parent.glob(".*"))
    with pytest.raises(DataError, match="exclude each other"):
        prepare(dataclasses.replace(options, validation_inputs=options.inputs))


def test_what_is_rejected_is_counted_and_listed(options: PreparationOptions, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\n{"text": ""}\n{"text"\n{"text": 1}\n{"text": "' + "the river " * 20 + '"}\n')
    damaged = tmp_path / "damaged.jsonl.gz"
    damaged.write_bytes(gzip.compress(options.inputs[0].read_bytes())[:-8])
    (tmp_path / "empty.txt").touch()
    inputs = (bad, damaged, tmp_path / "empty.txt")
    skipping = dataclasses.replace(options, inputs=inputs, on_malformed="skip", min_tokens=5)
    summary = prepare(skipping)
    expected = {"damaged file": 1, "empty": 1, "empty file": 1, "malformed JSON": 1, "no text field": 1, "too short": 1}
    assert summary.rejected == expected
    rejected = [json.loads(line) for line in (options.output / REJECTED_NAME).read_text().splitlines()]
    assert [(entry["file"], entry["line"], entry["reason"]) for entry in rejected] == [
        (str(bad), 3, "malformed JSON"),
        (str(bad), 4, "no text field"),
        (str(damaged), 61, "damaged file"),
        (str(tmp_path / "empty.txt"), 1, "empty file"),
    ]
    assert len(texts(options.output, "train") + texts(options.output, "validation")) == 61
    assert f"{bad}, line 3: malformed JSON" in str(summary)
    assert "1 too short" in str(summary)
    assert str(prepare(skipping)).partition("\n")[2] == str(summary).partition("\n")[2]
    for path, message in ((bad, "line 3: malformed"), (damaged, "damaged or"), (inputs[2], "no document")):
        with pytest.raises(DataError, match=message):
            prepare(dataclasses.replace(options, inputs=(path,), output=tmp_path / path.stem))


def test_skipping_goes_on_where_failing_stopped(options: PreparationOptions, tmp_path: Path) -> None:
    large = tmp_path / "large.jsonl"
    large.write_bytes(options.inputs[0].read_bytes() * 3 + b"{\n" + options.inputs[0].read_bytes())
    failing = dataclasses.replace(options, inputs=(large,))
    with pytest.raises(DataError, match=r"large.jsonl, line 181: malformed JSON"):
        prepare(failing)
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob(".shards.partial/output/train/*")}
    assert len(kept) > 6
    skipping = dataclasses.replace(failing, on_malformed="skip")
    prepare(skipping)
    assert {name: (options.output / "train" / name).stat().st_mtime_ns for name in kept} == kept
    prepare(dataclasses.replace(skipping, output=tmp_path / "whole"))
    assert files(options.output) == files(tmp_path / "whole")


def test_other_options_delete_no_finished_shards(options: PreparationOptions, tmp_path: Path) -> None:
    """Until there is a finished shard, they replace what was asked for."""
    large = tmp_path / "large.jsonl"
    large.write_bytes(options.inputs[0].read_bytes() * 3 + b"{\n")
    skipping = dataclasses.replace(options, inputs=(large,), on_malformed="skip", remove_duplicates=True)
    partial = tmp_path / ".shards.partial"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.preparation.phases.find_kept", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(skipping)
    kept = files(partial)
    assert len(list(partial.glob("intermediate/*/*.tar"))) > 1
    for change, field in (({"on_malformed": "fail"}, "on_malformed"), ({"min_tokens": 2, "shard_tokens": 9}, ".*")):
        with pytest.raises(
            DataError, match=rf"shards that were made otherwise \({field} differ\); .* or delete {partial}"
        ):
            prepare(dataclasses.replace(skipping, **change))
    (partial / "preparation.json").write_text("{}")
    with pytest.raises(DataError, match=r"made otherwise \(by another command\)"):
        prepare(skipping)
    (partial / "preparation.json").write_bytes(kept["preparation.json"])
    assert files(partial) == kept
    for shard in partial.rglob("*.tar"):
        shard.unlink()
    assert not prepare(dataclasses.replace(skipping, remove_duplicates=False)).already_prepared


def interrupted(*arguments: object, **named: object) -> None:
    raise KeyboardInterrupt


def test_what_a_kill_after_the_end_leaves_is_removed(
    options: PreparationOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = tmp_path / ".shards.partial"
    with monkeypatch.context() as patch:
        patch.setattr("data.preparation.output_directory.fsync_path", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(options)
    assert partial.is_dir()
    assert prepare(options).already_prepared
    assert not partial.exists()
    # One that holds shards may belong to other data, whose output was moved away.
    (partial / "output").mkdir(parents=True)
    assert prepare(options).already_prepared
    assert partial.exists()


def test_an_output_in_the_folder_of_the_inputs(options: PreparationOptions, capsys: pytest.CaptureFixture[str]) -> None:
    """Asked for again, its own files are no inputs; what else is no input is counted."""
    folder = options.output.parent
    (folder / "a.JSONL").write_text('{"text": "the river"}\n{\n')
    (folder / "README.md").touch()
    inside = dataclasses.replace(options, inputs=(folder,), on_malformed="skip", validation_fraction=0.0)
    assert prepare(inside).rejected == {"malformed JSON": 1}
    assert capsys.readouterr().err == "left out files of unknown kinds: 1 .md\n"
    assert prepare(inside).already_prepared


def test_the_output_may_be_a_link(options: PreparationOptions, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "disk" / "shards")
    linked = dataclasses.replace(options, output=link)
    assert not prepare(linked).already_prepared
    assert intact_shards(tmp_path / "disk" / "shards") > 1
    assert link.is_symlink()
    assert prepare(linked).already_prepared
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(DataError, match="loop is a link that leads back to itself"):
        prepare(dataclasses.replace(options, output=loop))


def test_a_token_outside_the_vocabulary_is_not_stored(
    options: PreparationOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a damaged tokenizer would give it; the library itself cannot be brought to it."""
    monkeypatch.setattr(
        "data.tokenizer._SentencePieceTokenizer.encode_batch", lambda self, texts: [[1, 330]] * len(texts)
    )
    with pytest.raises(
        DataError, match=r"corpus.jsonl, line 1: tokenizer .* gives token id 330, its vocabulary has 330"
    ):
        prepare(options)
    assert not list(options.output.parent.glob(".*"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", folder]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs the right to mount")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize(
    ("change", "free"),
    [({}, (50, 110)), ({"shuffle_documents": 1, "remove_duplicates": True}, (60, 150))],
)
def test_a_full_disk_leaves_finished_shards(
    options: PreparationOptions, tmp_path: Path, small_disk: Path, change: dict[str, object], free: tuple[int, int]
) -> None:
    """The disk is full in either phase; with more space, the same call goes on."""
    output = small_disk / "shards"
    on_disk = dataclasses.replace(options, output=output, **change)
    for kibibytes in free:
        (small_disk / "ballast").write_bytes(bytes((512 - kibibytes) << 10))
        with pytest.raises(DataError, match=r"No space left on device; finished shards are kept: free space"):
            prepare(on_disk)
        assert not output.exists()
        assert not list(small_disk.rglob("*.tmp"))
        kept = {path.name: path.stat().st_mtime_ns for path in small_disk.glob(".shards.partial/output/train/*.tar")}
        kept |= {path.name: path.stat().st_mtime_ns for path in small_disk.glob(".shards.partial/intermediate/*/*.tar")}
        assert kept
    (small_disk / "ballast").unlink()
    prepare(on_disk)
    prepare(dataclasses.replace(on_disk, output=tmp_path / "whole"))
    assert files(output) == files(tmp_path / "whole")


def test_resuming_opens_and_tokenizes_only_what_is_missing(
    options: PreparationOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three files, the second ends in malformed input, so that shards hold all of the first and part of it."""
    opened: list[str] = []
    tokenized: list[str] = []
    read = tokenizing.read_chunks
    encode = _SentencePieceTokenizer.encode_batch

    def read_chunks(path: Path, text_field: str) -> Iterator[Chunk]:
        opened.append(path.name)
        return read(path, text_field)

    def encode_batch(self: Tokenizer, batch: Sequence[str]) -> list[list[int]]:
        tokenized.extend(batch)
        return encode(self, batch)

    monkeypatch.setattr(tokenizing, "read_chunks", read_chunks)
    monkeypatch.setattr(_SentencePieceTokenizer, "encode_batch", encode_batch)
    lines = options.inputs[0].read_bytes()
    inputs = tuple(tmp_path / f"{number}.jsonl" for number in range(3))
    for path, content in zip(inputs, (lines, lines + b"{\n", lines), strict=True):
        path.write_bytes(content)
    job = dataclasses.replace(options, inputs=inputs, validation_fraction=0.0)
    with pytest.raises(DataError, match=r"1.jsonl, line 61"):
        prepare(job)
    assert opened == ["0.jsonl", "1.jsonl"]
    kept = sum(len(np.load(path)) for path in tmp_path.glob(".shards.partial/output/train/*.lengths.npy"))
    assert 60 < kept < 120
    opened.clear()
    tokenized.clear()
    prepare(dataclasses.replace(job, on_malformed="skip"))
    assert opened == ["1.jsonl", "2.jsonl"]
    assert len(tokenized) == 180 - kept
