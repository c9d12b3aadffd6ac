import math
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from checkpoints.checksummed_file import write_checksummed
from checkpoints.errors import CheckpointError
from checkpoints.files import sha256_of
from checkpoints.fragments import Fragment, FragmentReader, write_fragments
from checkpoints.records import Manifest, record_file, slice_box
from checkpoints.store import CheckpointStore

Layout = tuple[int | None, list[tuple[int, int, list[int]]]]


def cuts(draw: st.DrawFn, size: int) -> list[int]:
    """Boundaries of a random partition of 0..size."""
    inner = draw(st.sets(st.integers(1, size - 1), max_size=3)) if size > 1 else set()
    return [0, *sorted(inner), size]


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, ...]) -> Layout:
    """A split axis and, for each slice, its rows and flat boundaries."""
    axis = draw(st.none() | st.integers(0, len(shape) - 1)) if shape else None
    rows = [0, 0] if axis is None else cuts(draw, shape[axis])
    slices = []
    for start, stop in pairwise(rows):
        elements = math.prod(high - low for low, high in slice_box(shape, axis, start, stop))
        slices.append((start, stop, cuts(draw, elements)))
    return axis, slices


def pieces_of(whole: torch.Tensor, layout: Layout) -> list[tuple[Fragment, torch.Tensor]]:
    axis, slices = layout
    pieces = []
    for start, stop, bounds in slices:
        part = whole if axis is None else whole.narrow(axis, start, stop - start)
        flat = part.flatten()
        for low, high in pairwise(bounds):
            fragment = Fragment("p", "weight", tuple(whole.shape), axis, start, stop, low, high)
            pieces.append((fragment, flat[low:high]))
    return pieces


def publish(root: Path, pieces: list[tuple[Fragment, torch.Tensor]], files: int = 1) -> Path:
    store = CheckpointStore(root)
    temporary = store.begin(1)
    records = [write_fragments(temporary / f"{rank}.safetensors", pieces[rank::files]) for rank in range(files)]
    return store.publish(1, temporary, records, {})


@given(st.data())
@settings(max_examples=150)
def test_any_layout_reads_back_under_any_other(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 6), max_size=3), label="shape"))
    source = data.draw(layouts(shape), label="source")
    target = data.draw(layouts(shape), label="target")
    whole = torch.randn(shape)
    with tempfile.TemporaryDirectory() as folder:
        path = publish(Path(folder), pieces_of(whole, source), files=2)
        with FragmentReader(path) as reader:
            assert torch.equal(reader.read_full("p", "weight"), whole)
            for wanted, expected in pieces_of(whole, target):
                got = reader.read(
                    "p",
                    "weight",
                    split_axis=wanted.split_axis,
                    split_start=wanted.split_start,
                    split_stop=wanted.split_stop,
                    flat_start=wanted.flat_start,
                    flat_stop=wanted.flat_stop,
                )
                assert torch.equal(got, expected)


@given(st.data())
@settings(max_examples=60)
def test_a_missing_piece_is_refused_at_publish_and_at_read(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(2, 5), min_size=1, max_size=3), label="shape"))
    pieces = pieces_of(torch.randn(shape), data.draw(layouts(shape), label="source"))
    lost = data.draw(st.integers(0, len(pieces) - 1), label="lost")
    other = (Fragment("q", "weight", (1,), None, 0, 0, 0, 1), torch.zeros(1))
    rest = [other, *pieces[:lost], *pieces[lost + 1 :]]
    with tempfile.TemporaryDirectory() as folder:
        if len(pieces) > 1:
            with pytest.raises(CheckpointError, match=r"no rank wrote .* of p \(weight\)"):
                publish(Path(folder), rest)
        directory = unchecked_directory(Path(folder) / "damaged", rest)
        with FragmentReader(directory) as reader, pytest.raises(CheckpointError, match=r"\bp\b"):
            reader.read_full("p", "weight")


def unchecked_directory(directory: Path, pieces: list[tuple[Fragment, torch.Tensor]]) -> Path:
    """A checkpoint directory whose manifest is intact and whose fragments were never checked."""
    directory.mkdir()
    record = write_fragments(directory / "0.safetensors", pieces)
    (directory / "manifest.json").write_text(Manifest(1, (record,), {}).to_json())
    return directory


def test_the_missing_range_is_named(tmp_path: Path) -> None:
    whole = torch.randn(4, 6)
    pieces = pieces_of(whole, (0, [(0, 2, [0, 5, 9, 12]), (2, 4, [0, 12])]))
    del pieces[1]
    directory = unchecked_directory(tmp_path / "checkpoint", pieces)
    with FragmentReader(directory) as reader:
        with pytest.raises(CheckpointError, match=r"p \(weight\), slice \[0:2, 0:6\], lacks the flat range 5:9"):
            reader.read("p", "weight", split_axis=0, split_start=0, split_stop=2)
        with pytest.raises(CheckpointError, match=r"slice \[0:4, 0:6\], lacks the flat range 5:9"):
            reader.read_full("p", "weight")
        assert torch.equal(reader.read("p", "weight", flat_start=9), whole.flatten()[9:])


def test_replicated_copies_are_harmless(tmp_path: Path) -> None:
    whole = torch.randn(5, 3)
    pieces = pieces_of(whole, (None, [(0, 0, [0, 4, 15])]))
    store = CheckpointStore(tmp_path)
    temporary = store.begin(1)
    records = [write_fragments(temporary / f"{rank}.safetensors", pieces) for rank in range(3)]
    path = store.publish(1, temporary, records, {})
    with FragmentReader(path) as reader:
        assert torch.equal(reader.read_full("p", "weight"), whole)


def test_tensors_that_share_memory_are_written_each_in_full(tmp_path: Path) -> None:
    flat = torch.randn(6)
    ranges = {"a": (0, 6), "b": (0, 6), "c": (2, 5), "d": (4, 6)}
    pieces = [(Fragment(n, "weight", (j - i,), None, 0, 0, 0, j - i), flat[i:j]) for n, (i, j) in ranges.items()]
    with FragmentReader(publish(tmp_path, pieces)) as reader:
        for name, (start, stop) in ranges.items():
            assert torch.equal(reader.read_full(name, "weight"), flat[start:stop])


def test_a_gap_in_one_stored_split_is_filled_from_another(tmp_path: Path) -> None:
    whole = torch.randn(4, 3)
    complete = pieces_of(whole, (0, [(0, 2, [0, 6]), (2, 4, [0, 6])]))
    partial = pieces_of(whole, (None, [(0, 0, [0, 2, 12])]))[:1]
    for order in (complete + partial, partial + complete):
        directory = unchecked_directory(tmp_path / order[0][0].key.replace("|", "_"), order)
        with FragmentReader(directory) as reader:
            got = reader.read("p", "weight", split_axis=1, split_start=1, split_stop=3)
        assert torch.equal(got, whole[:, 1:3].flatten())


def test_wrong_requests_are_explained(tmp_path: Path) -> None:
    path = publish(tmp_path, pieces_of(torch.randn(4, 2), (None, [(0, 0, [0, 8])])))
    with FragmentReader(path) as reader:
        assert reader.names("weight") == ["p"]
        assert reader.names("exp_avg") == []
        assert reader.global_shape("p") == (4, 2)
        with pytest.raises(CheckpointError, match="holds no parameter q; the nearest is p"):
            reader.read_full("q", "weight")
        with pytest.raises(CheckpointError, match=r"p \(exp_avg\)"):
            reader.read_full("p", "exp_avg")
        with pytest.raises(CheckpointError, match=r"slice \[2:9, 0:2\]"):
            reader.read("p", "weight", split_axis=0, split_start=2, split_stop=9)
        with pytest.raises(CheckpointError, match="range 3:99"):
            reader.read("p", "weight", flat_start=3, flat_stop=99)


def test_a_tensor_that_does_not_fit_its_fragment_is_refused(tmp_path: Path) -> None:
    fragment = Fragment("p", "weight", (4,), None, 0, 0, 0, 4)
    for wrong in (torch.zeros(3), torch.zeros(2, 2), torch.zeros(4, dtype=torch.bfloat16)):
        with pytest.raises(CheckpointError, match=r"needs torch.float32 of shape \(4,\)"):
            write_fragments(tmp_path / "file.safetensors", [(fragment, wrong)])
    with pytest.raises(CheckpointError, match="given twice"):
        write_fragments(tmp_path / "file.safetensors", [(fragment, torch.zeros(4))] * 2)


@pytest.mark.parametrize(
    "change",
    [{"kind": "momentum"}, {"split_axis": 2}, {"split_stop": 5}, {"flat_stop": 9}, {"flat_start": 5, "flat_stop": 4}],
)
def test_impossible_fragments_are_refused(change: dict[str, object]) -> None:
    fields: dict[str, object] = {
        "name": "p",
        "kind": "weight",
        "global_shape": (4, 2),
        "split_axis": 0,
        "split_start": 0,
        "split_stop": 4,
        "flat_start": 0,
        "flat_stop": 8,
    }
    Fragment(**fields)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="fragment p"):
        Fragment(**(fields | change))  # type: ignore[arg-type]


def test_files_without_fragments_are_part_of_a_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    temporary = store.begin(7)
    (temporary / "config.yaml").write_text("a: 1\n")
    path = store.publish(7, temporary, [record_file(temporary / "config.yaml")], {"names": {1: "x", 10: "y", 2: "z"}})
    loaded = store.newest()
    assert loaded is not None
    assert loaded.files == ("config.yaml",)
    assert loaded.metadata == {"names": {"1": "x", "10": "y", "2": "z"}}
    (path / "config.yaml").write_text("a: 2\n")
    with pytest.raises(CheckpointError, match=r"config.yaml is damaged"):
        store.at_step(7)


def test_the_checksum_computed_while_writing_is_that_of_the_file(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3 << 20), "b": torch.randn(5), "an ü": torch.randn(1)}
    checksum = write_checksummed(tmp_path / "file", tensors)
    assert checksum == sha256_of(tmp_path / "file")
    read = load_file(tmp_path / "file")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
