import os
from pathlib import Path

import pytest

from data.errors import DataError
from data.preparation.inputs import HASHED_BYTES, check_no_file_twice, expand_inputs, identify


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
    found = expand_inputs([folder / pattern for pattern in patterns], "--input")
    assert [path.relative_to(folder).as_posix() for path in found] == names


def test_a_name_that_looks_like_a_pattern_is_a_name(tmp_path: Path) -> None:
    path = tmp_path / "a[1].txt"
    path.touch()
    assert expand_inputs([path], "--input") == (path,)


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
        expand_inputs([folder / pattern], "--input")


def test_the_same_file_twice(folder: Path) -> None:
    os.link(folder / "b.jsonl", folder / "other.jsonl")
    check_no_file_twice(expand_inputs([folder / "deep"], "--input"))
    with pytest.raises(DataError, match=r"other.jsonl is given twice \(as .*b.jsonl, too\); name it once"):
        check_no_file_twice(expand_inputs([folder], "--input"))


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
