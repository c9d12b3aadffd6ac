import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from data.errors import DataError
from data.preparation.documents import read_documents

TEXTS = ["first\nsecond  line\r\n", " \u00e9\u6f22 ", "x" * 5000]


def json_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text, "other": 1}) + "\n" for text in texts).encode()


def read(path: Path) -> list[str]:
    return list(read_documents(path))


@pytest.mark.parametrize(
    ("ending", "compress"),
    [("", bytes), (".xz", lzma.compress), (".gz", gzip.compress), (".zst", zstandard.compress)],
)
def test_plain_and_compressed_files(tmp_path: Path, ending: str, compress: Callable[[bytes], bytes]) -> None:
    lines = tmp_path / f"a.b.jsonl{ending}"
    lines.write_bytes(compress(json_lines(TEXTS)))
    assert read(lines) == TEXTS
    text = tmp_path / f"a.txt{ending}"
    text.write_bytes(compress(TEXTS[0].encode()))
    assert read(text) == TEXTS[:1]


def test_zstandard_with_several_frames(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.compress(json_lines(TEXTS[:1])) + zstandard.compress(json_lines(TEXTS[1:])))
    assert read(path) == TEXTS


@pytest.mark.parametrize("kept", [1, 5, 100, -1])
def test_a_cut_zstandard_file_is_an_error(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "a.jsonl.zst"
    frame = zstandard.compress(json_lines([str(i) for i in range(1000)]))
    path.write_bytes(zstandard.compress(json_lines(TEXTS)) + frame[:kept])
    with pytest.raises(DataError, match=r"a\.jsonl\.zst cannot be read .* incomplete"):
        read(path)


@pytest.mark.parametrize("damage", [b"no zstandard at all", zstandard.compress(b"a" * 100) + b"garbage"])
def test_a_damaged_zstandard_file_is_an_error(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "a.txt.zst"
    path.write_bytes(damage)
    with pytest.raises(DataError, match="damaged"):
        read(path)


def test_progress_adds_up_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(TEXTS))
    steps: list[int] = []
    list(read_documents(path, steps.append))
    assert sum(steps) == path.stat().st_size


def test_blank_lines_empty_documents_and_byte_order_marks_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json_lines(["a", ""]) + b"\n  \n" + json_lines(["b"]).rstrip())
    assert read(path) == ["a", "b"]
    text = tmp_path / "a.txt"
    text.write_bytes(b"\xef\xbb\xbfa")
    assert read(text) == ["a"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt holds no document; remove it"),
        ("a.jsonl", b"\n \n", "a.jsonl holds no document"),
        ("a.jsonl", b'{"text": ""}\n', "a.jsonl holds no document"),
        ("a.txt", b"one\ntwo\n\xff\xfe", r"a.txt, line 3: byte 0xff is not valid UTF-8 text; convert"),
        ("a.txt", b"one\n\0two", r"a.txt, line 2: NUL character"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', r"a.jsonl, line 2: byte 0xe9 is not valid UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\\u0000"}\n', r"line 2: NUL character"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"line 1: unpaired surrogate U\+D800"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', r"a.jsonl, line 3: malformed JSON .*; write one JSON object"),
        ("a.jsonl", b'{"content": "a"}\n', r"a.jsonl, line 1: no \"text\" field .*found the fields \['content'\]"),
        ("a.jsonl", b'{"text": 1}\n', r"a.jsonl, line 1: no \"text\" field with a string"),
        ("a.jsonl", b'["text"]\n', r"a.jsonl, line 1: no \"text\" field .*found a JSON list"),
        ("a.jsonl.xz", lzma.compress(json_lines(TEXTS))[:-20], r"a.jsonl.xz cannot be read .*damaged or incomplete"),
        ("a.jsonl.xz", b"not xz", r"a.jsonl.xz cannot be read .*damaged"),
        ("a.jsonl.gz", gzip.compress(json_lines(TEXTS))[:-20], r"a.jsonl.gz cannot be read .*damaged"),
        ("a.txt.gz", b"not gzip", r"a.txt.gz cannot be read .*damaged"),
        ("a.csv", b"a", r"a.csv is of an unknown kind; its name must end in .txt, .jsonl or .parquet"),
        ("a.xz", b"a", r"a.xz is of an unknown kind"),
    ],
)
def test_bad_files_are_named_with_the_fix(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent.txt does not exist"):
        read(tmp_path / "absent.txt")
    with pytest.raises(DataError, match=r"is not a file; name the files in it"):
        read(tmp_path)
