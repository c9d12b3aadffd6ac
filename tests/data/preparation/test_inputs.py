import gzip
import os
from pathlib import Path

import pytest

from data.errors import DataError
from data.preparation.documents import read_documents
from data.preparation.inputs import HASHED_BYTES, check_no_file_twice, expand_inputs, identify


def expand(*patterns: Path, output: Path = Path("absent")) -> tuple[Path, ...]:
    return expand_inputs(patterns, "--input", output).files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.jsonl", "a.txt.gz", "deep/c.parquet", "deep/d.jsonl.zst", ".hidden/e.txt", ".f.txt", "README.md"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    return tmp_path


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["."], ["a.txt.gz", "b.jsonl", "deep/c.parquet", "deep/d.jsonl.zst"]),
        (["deep", "b.jsonl"], ["deep/c.parquet", "deep/d.jsonl.zst", "b.jsonl"]),
        (["*.jsonl"], ["b.jsonl"]),
        (["**/*.jsonl*"], ["b.jsonl", "deep/d.jsonl.zst"]),
        (["[ab].*", "deep/?.parquet"], ["a.txt.gz", "b.jsonl", "deep/c.parquet"]),
        ([".hidden/e.txt"], [".hidden/e.txt"]),
    ],
)
def test_files_globs_and_directories(folder: Path, patterns: list[str], names: list[str]) -> None:
    found = expand(*(folder / pattern for pattern in patterns))
    assert [path.relative_to(folder).as_posix() for path in found] == names


def test_a_name_that_looks_like_a_pattern_is_a_name(tmp_path: Path) -> None:
    path = tmp_path / "a[1].txt"
    path.touch()
    assert expand(path) == (path,)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("absent.txt", r"input file .*absent.txt does not exist"),
        ("*.csv", r"--input .*\*.csv finds no file that ends in .txt, .jsonl, .parquet"),
        (".hidden/empty", r"--input .*empty finds no file"),
        ("*", r"README.md is of an unknown kind"),
    ],
)
def test_nothing_found_and_unknown_kinds(folder: Path, pattern: str, message: str) -> None:
    (folder / ".hidden" / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        expand(folder / pattern)


def test_endings_in_capitals_and_what_is_left_out(folder: Path) -> None:
    for name in ("C.JSONL", "d.Txt.GZ", "e.csv", "deep/f.csv", "deep/LICENSE", "g.gz", ".hidden/h.csv"):
        (folder / name).touch()
    found = expand_inputs([folder], "--input", Path("absent"))
    assert {"C.JSONL", "d.Txt.GZ"} < {path.name for path in found.files}
    assert found.left_out == {".csv": 2, ".md": 1, ".gz": 1, "no ending": 1}
    (folder / "C.JSONL").write_text('{"text": "a"}')
    (folder / "d.Txt.GZ").write_bytes(gzip.compress(b"b"))
    assert [*read_documents(folder / "C.JSONL"), *read_documents(folder / "d.Txt.GZ")] == ["a", "b"]


def test_an_output_among_the_inputs_is_no_input(folder: Path) -> None:
    output = folder / "deep" / "shards"
    output.mkdir()
    before = expand(folder)
    (output / "rejected.jsonl").touch()
    assert expand(folder, output=output) != before
    (output / "preparation.json").touch()
    link = folder / "link"
    link.symlink_to(output)
    assert expand(folder, output=output) == before
    assert expand(folder, output=link) == before
    assert expand(folder / "**" / "*.jsonl", output=output) == (folder / "b.jsonl",)


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"bad\xff.jsonl")
    path.touch()
    with pytest.raises(DataError, match=r"bad\\udcff.jsonl' has a name that is not UTF-8; rename it"):
        identify(path)


def test_the_same_file_twice(folder: Path) -> None:
    os.link(folder / "b.jsonl", folder / "other.jsonl")
    check_no_file_twice(expand(folder / "deep"))
    with pytest.raises(DataError, match=r"other.jsonl is given twice \(as .*b.jsonl, too\); name it once"):
        check_no_file_twice(expand(folder))


def test_identity_of_small_and_large_files(tmp_path: Path) -> None:
    """Of a large file its ends and evenly spaced blocks count, and its size."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"abc")
    small = identify(path)
    path.write_bytes(b"abd")
    assert identify(path) != small
    size = 4 * HASHED_BYTES
    with open(path, "wb") as file:
        file.truncate(size)
    sparse = identify(path)
    assert (sparse.name, sparse.bytes) == ("a.txt", size)
    for offset in (0, size - 1, size // 15 * 7):
        with open(path, "r+b") as file:
            file.seek(offset)
            file.write(b"x")
        changed = identify(path)
        assert changed.checksum != sparse.checksum
        sparse = changed
