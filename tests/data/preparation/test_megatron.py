"""Datasets are written, and read to compare, by Megatron-core itself."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.errors import DataError
from data.manifest import read_manifest
from data.preparation import megatron
from data.preparation.indexed_dataset import IndexedDataset
from data.preparation.megatron import ImportOptions, check_import, import_megatron
from data.preparation.megatron_shards import Plan
from data.shards import ShardReader, read_document_lengths
from data.tokenizer import load_tokenizer
from tests.data.builders import intact_shards

ROOT = Path(__file__).resolve().parents[3]
VOCABULARY = 330


@pytest.fixture(scope="module")
def eos_id(sentencepiece_file: Path) -> int:
    return load_tokenizer(sentencepiece_file).eos_id


@pytest.fixture(scope="module")
def documents(eos_id: int) -> list[list[int]]:
    """Four hundred; of each four one ends without an end of text, and some are empty or nothing but that."""
    generator = np.random.default_rng(0)
    made = []
    for number in range(400):
        tokens = generator.integers(eos_id + 1, VOCABULARY, generator.integers(1, 80)).tolist()
        tokens = [] if number % 50 in (0, 1, 49) else tokens
        made.append(tokens if number % 4 == 1 else [*tokens, eos_id])
    return made


def write_dataset(prefix: Path, documents: Sequence[Sequence[int]], dtype: type[np.number] = np.uint16) -> Path:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for tokens in documents:
        # Every other document as two sequences, as Megatron's sentence splitter does it.
        half = len(tokens) // 2 if len(tokens) % 2 else 0
        builder.add_document(np.asarray(tokens), [half, len(tokens) - half] if half else [len(tokens)])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.fixture
def options(documents: list[list[int]], sentencepiece_file: Path, tmp_path: Path) -> ImportOptions:
    prefix = write_dataset(tmp_path / "source_0.5_text", documents)
    return ImportOptions((prefix,), tmp_path / "shards", sentencepiece_file, shard_tokens=1000, progress=False)


def stored(directory: Path, split: str = "train") -> list[list[int]]:
    manifest = read_manifest(directory / split)
    found = []
    for record in manifest.shards:
        tokens = ShardReader(directory / split / record.file, record, manifest.dtype).read(0, record.tokens)
        lengths = read_document_lengths(directory / split, record)
        found += [part.tolist() for part in np.split(tokens, np.cumsum(lengths)[:-1])]
    return found


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def stripped(documents: Sequence[list[int]], eos_id: int) -> list[list[int]]:
    without = [tokens[:-1] if tokens[-1:] == [eos_id] else tokens for tokens in documents]
    return [tokens for tokens in without if tokens]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_every_document_is_imported_and_checked(
    options: ImportOptions, documents: list[list[int]], eos_id: int, dtype: type[np.number]
) -> None:
    write_dataset(options.inputs[0], documents, dtype)
    summary = import_megatron(options)
    assert stored(options.output) == stripped(documents, eos_id)
    manifest = read_manifest(options.output / "train")
    assert all(record.tokens >= 900 for record in manifest.shards[:-1])
    assert intact_shards(options.output) == len(manifest.shards) > 10
    ended = sum(tokens[-1:] == [eos_id] for tokens in documents)
    empty = len(documents) - manifest.documents
    assert f"{ended} of 400 documents gave up their end of text, {empty} empty ones were left out" in str(summary)
    sentence = f"{manifest.tokens:,} tokens in {len(manifest.shards)} shards of {options.output} are those of the data"
    assert check_import(options).startswith(sentence)
    again = import_megatron(dataclasses.replace(options, workers=2))
    assert (again.already_prepared, again.statistics) == (True, summary.statistics)


def test_an_end_of_text_can_be_kept(options: ImportOptions, documents: list[list[int]]) -> None:
    options = dataclasses.replace(options, end_of_text="keep")
    import_megatron(options)
    assert stored(options.output) == [tokens for tokens in documents if tokens]
    check_import(options)


def test_no_short_document_is_lost(options: ImportOptions, eos_id: int, tmp_path: Path) -> None:
    """Whole datasets of documents that have one token, which is an end of text or not, or none."""
    short = [[5], [eos_id], [], [7], [eos_id], [eos_id, eos_id], [9]]
    inputs = tuple(
        write_dataset(tmp_path / name, documents)
        for name, documents in (("a", short), ("b", [[1, 2, 3, 4]]), ("c", [[], [eos_id]]))
    )
    for treatment, expected in (("strip", stripped(short, eos_id)), ("keep", [tokens for tokens in short if tokens])):
        last = [] if treatment == "strip" else [[eos_id]]
        for shard_tokens in (1, 2, 1000):
            job = dataclasses.replace(
                options,
                inputs=inputs,
                output=tmp_path / f"{treatment}-{shard_tokens}",
                end_of_text=treatment,
                shard_tokens=shard_tokens,
            )
            counts = import_megatron(job).statistics["train"]
            found = stored(job.output)
            assert found == [*expected, [1, 2, 3, 4], *last]
            assert counts.documents + counts.empty_documents == 10
            assert check_import(job).endswith(f"{len(found)} documents and {10 - len(found)} empty ones left out")


def test_a_loss_is_noticed(options: ImportOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the plan forgot the last documents."""
    message = r"shards: \d+ documents and \d+ empty ones are not the 400 of the datasets"
    with monkeypatch.context() as patch:
        plan = megatron.plan_shards

        def forget(*arguments: Any) -> Plan:
            made = plan(*arguments)
            return dataclasses.replace(made, shards=made.shards[:-1])

        patch.setattr(megatron, "plan_shards", forget)
        with pytest.raises(DataError, match=message):
            import_megatron(options)
        patch.setattr(megatron, "_check_nothing_lost", lambda job, statistics: None)
        shutil.rmtree(options.output.with_name(".shards.partial"))
        import_megatron(options)
    with monkeypatch.context() as patch:
        patch.setattr(megatron, "plan_shards", forget)
        with pytest.raises(DataError, match=message):
            check_import(options)


def test_other_options_delete_no_finished_shards(options: ImportOptions, documents: list[list[int]]) -> None:
    bad = [*documents[:-1], [VOCABULARY]]
    write_dataset(options.inputs[0], bad)
    with pytest.raises(DataError, match="holds the token id"):
        import_megatron(options)
    partial = options.output.with_name(".shards.partial")
    kept = files(partial)
    assert len(kept) > 10
    with pytest.raises(
        DataError, match=r"\d+ finished shards that were made otherwise \(end_of_text differ\); give the"
    ):
        import_megatron(dataclasses.replace(options, end_of_text="keep"))
    assert files(partial) == kept


def test_validation_by_fraction_or_dataset(
    options: ImportOptions, documents: list[list[int]], eos_id: int, tmp_path: Path
) -> None:
    by_fraction = dataclasses.replace(options, validation_fraction=0.2)
    import_megatron(by_fraction)
    train, validation = stored(options.output), stored(options.output, "validation")
    everything = stripped(documents, eos_id)
    assert sorted(train + validation) == sorted(everything)
    assert train == [tokens for tokens in everything if tokens not in validation]
    assert 40 < len(validation) < 120
    check_import(by_fraction)
    other = write_dataset(tmp_path / "other", documents[:30])
    two = dataclasses.replace(options, validation_inputs=(other,), inputs=(*options.inputs,), output=tmp_path / "two")
    import_megatron(two)
    assert stored(two.output, "validation") == stripped(documents[:30], eos_id)


def test_parts_are_read_as_one_file(options: ImportOptions, tmp_path: Path) -> None:
    """Cut at odd bytes, too, in the middle of a token."""
    import_megatron(options)
    prefix, parted = options.inputs[0], tmp_path / "parted"
    shutil.copy(f"{prefix}.idx", f"{parted}.idx")
    content = Path(f"{prefix}.bin").read_bytes()
    cuts = [0, 1, 4001, 9000, len(content)]
    for number in range(4):
        path = Path(f"{parted}-{number:05d}-of-00004.bin")
        path.write_bytes(content[cuts[number] : cuts[number + 1]])
    from_parts = dataclasses.replace(options, inputs=(parted,), output=tmp_path / "from-parts")
    import_megatron(from_parts)
    assert files(from_parts.output / "train") == files(options.output / "train")
    Path(f"{parted}-00002-of-00004.bin").unlink()
    with pytest.raises(DataError, match=r"parted-00002-of-00004.bin is missing: 3 of 4 parts were found"):
        import_megatron(from_parts)


def test_documents_are_those_that_megatron_reads(options: ImportOptions) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset as MegatronDataset

    ours, theirs = IndexedDataset(options.inputs[0]), MegatronDataset(str(options.inputs[0]))
    offsets = ours.offsets(0, ours.documents)
    for number in range(ours.documents):
        first, last = theirs.document_indices[number : number + 2]
        expected = [token for sequence in range(first, last) for token in theirs[sequence].tolist()]
        assert ours.read(offsets[number], offsets[number + 1]).tolist() == expected


@pytest.mark.slow
def test_shards_do_not_depend_on_workers_and_kills(options: ImportOptions, tmp_path: Path) -> None:
    """Killed once a shard is finished, again and again, until nothing is left to do."""
    repeated = dataclasses.replace(options, shard_tokens=100_000, validation_fraction=0.1)
    with open(f"{options.inputs[0]}.bin", "rb") as file:
        tokens = np.frombuffer(file.read(), dtype=np.uint16).tolist()
    write_dataset(repeated.inputs[0], [tokens[:200]] * 10_000)
    import_megatron(repeated)
    killed = dataclasses.replace(repeated, output=tmp_path / "killed")
    command = [sys.executable, ROOT / "tools" / "import_megatron.py", "--input", *killed.inputs, "--workers", "2"]
    command += ["--output", killed.output, "--tokenizer", killed.tokenizer]
    command += ["--shard-tokens", "100000", "--validation-fraction", "0.1"]
    partial = tmp_path / ".killed.partial"
    for shards in (3, 9):
        process = subprocess.Popen(command, stderr=subprocess.PIPE)
        while len(list(partial.glob("output/*/*.tar"))) < shards:
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    subprocess.run(command, check=True, capture_output=True)
    assert files(killed.output) == files(repeated.output)
    assert not partial.exists()
    checked = subprocess.run([*command, "--check"], check=True, capture_output=True, text=True)
    assert "are those of the datasets" in checked.stdout


def test_a_check_names_the_first_difference(options: ImportOptions, documents: list[list[int]]) -> None:
    import_megatron(options)
    record = read_manifest(options.output / "train").shards[2]
    lengths = read_document_lengths(options.output / "train", record)
    shard = options.output / "train" / record.file
    content = bytearray(shard.read_bytes())
    content[record.sample_offsets[0] + 2 * (int(lengths[0]) + 3)] ^= 1
    os.chmod(shard, 0o644)
    shard.write_bytes(content)
    with pytest.raises(
        DataError, match=r"shard-00002.tar differs from .*source_0.5_text: document \d+, from its token 3"
    ):
        check_import(options)
    with pytest.raises(DataError, match="shards does not exist; import it first") as caught:
        check_import(dataclasses.replace(options, output=options.output.parent / "absent-shards"))
    assert "--check" in str(caught.value)


def test_another_request_overwrites_nothing(options: ImportOptions, documents: list[list[int]]) -> None:
    import_megatron(options)
    before = files(options.output)
    with pytest.raises(DataError, match=r"was made from something else \(end_of_text differ\); give another"):
        import_megatron(dataclasses.replace(options, end_of_text="keep"))
    write_dataset(options.inputs[0], documents[:-1])
    with pytest.raises(DataError, match=r"\(inputs differ\)"):
        import_megatron(options)
    assert files(options.output) == before


def cut_index(prefix: Path) -> None:
    os.truncate(f"{prefix}.idx", Path(f"{prefix}.idx").stat().st_size - 1)


def patch_index(position: int, value: bytes) -> Callable[[Path], None]:
    def patch(prefix: Path) -> None:
        with open(f"{prefix}.idx", "r+b") as file:
            file.seek(position, os.SEEK_SET if position >= 0 else os.SEEK_END)
            file.write(value)

    return patch


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda prefix: Path(f"{prefix}.idx").unlink(),
            r"text.idx does not exist; give the path of an indexed dataset",
        ),
        (lambda prefix: Path(f"{prefix}.bin").unlink(), r"text.bin does not exist, nor do parts of it"),
        (lambda prefix: os.truncate(f"{prefix}.bin", 1000), r"text.bin: 1,000 bytes, but .*text.idx speaks of"),
        (cut_index, r"text.idx has [\d,]+ bytes, but should have [\d,]+ for \d+ sequences"),
        (lambda prefix: os.truncate(f"{prefix}.idx", 20), "text.idx is no index of a Megatron dataset"),
        (patch_index(0, b"TNTIDX\0\0"), "text.idx is no index of a Megatron dataset"),
        (patch_index(9, b"\2"), "text.idx has version 2, only 1 is known"),
        (patch_index(17, b"\7"), "text.idx holds floating-point numbers, not tokens"),
        (patch_index(17, b"\x63"), r"text.idx names an unknown type of tokens \(99\)"),
        (patch_index(34 + 4 * 5, b"\1\1\0\0"), r"text.idx: sequence \d+ does not begin where the one before it ends"),
        (patch_index(-8 * 401, b"\1"), "its documents do not span"),
    ],
)
def test_damaged_datasets(options: ImportOptions, damage: Callable[[Path], None], message: str) -> None:
    damage(options.inputs[0])
    with pytest.raises(DataError, match=message):
        import_megatron(options)
    assert not options.output.exists()
    assert not list(options.output.parent.glob(".*"))


@pytest.mark.parametrize("bad", [VOCABULARY, -1])
def test_a_token_outside_the_vocabulary_is_named(options: ImportOptions, documents: list[list[int]], bad: int) -> None:
    changed = [list(tokens) for tokens in documents]
    changed[277][1] = bad
    write_dataset(options.inputs[0], changed, np.int32)
    message = (
        rf"source_0.5_text: document 277 holds the token id {bad}, but the vocabulary has 330; give the --tokenizer"
    )
    with pytest.raises(DataError, match=message):
        import_megatron(options)
    assert not options.output.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"validation_fraction": 1.0}, "--validation-fraction 1.0 must be"),
        ({"validation_fraction": 1e-9}, "no document went to the validation split"),
        ({"workers": 0}, "--workers 0 must be"),
        ({"shard_tokens": 0}, "--shard-tokens 0 must be"),
    ],
)
def test_bad_options(options: ImportOptions, change: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        import_megatron(dataclasses.replace(options, **change))
    assert not list(options.output.parent.glob(".*"))
    with pytest.raises(DataError, match="exclude each other"):
        import_megatron(dataclasses.replace(options, validation_inputs=options.inputs, validation_fraction=0.1))
    with pytest.raises(DataError, match=r"text.idx is given twice"):
        import_megatron(dataclasses.replace(options, inputs=options.inputs * 2))
