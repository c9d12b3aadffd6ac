import functools
import gzip
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.preparation.chunks import CHUNK_BYTES, Rejection, read_chunks
from data.preparation.documents import Document, parse_chunk, read_documents

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
        ("a.jsonl", b'{"text": "a", "id": ' + b"7" * 5000 + b"}", r"a.jsonl, line 1: malformed JSON .*digits"),
        ("a.jsonl", b'{"content": "a"}\n', r"a.jsonl, line 1: no \"text\" field .*found the fields \['content'\]"),
        ("a.jsonl", b'{"text": 1}\n', r"a.jsonl, line 1: no \"text\" field with a string"),
        ("a.jsonl", b'["text"]\n', r"a.jsonl, line 1: no \"text\" field .*found a JSON list"),
        ("a.jsonl.xz", lzma.compress(json_lines(TEXTS))[:-20], r"a.jsonl.xz cannot be read .*damaged or incomplete"),
        ("a.jsonl.xz", b"not xz", r"a.jsonl.xz cannot be read .*damaged"),
        ("a.jsonl.gz", gzip.compress(json_lines(TEXTS), mtime=0)[:-20], r"a.jsonl.gz cannot be read .*damaged"),
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


def write_table(path: Path, texts: list[str | None], column: str = "text") -> None:
    table = pyarrow.table({"other": list(range(len(texts))), column: pyarrow.array(texts, pyarrow.string())})
    pyarrow.parquet.write_table(table, path, row_group_size=3)


@pytest.mark.parametrize(
    ("ending", "compress"), [("", bytes), (".xz", lzma.compress), (".gz", gzip.compress), (".zst", zstandard.compress)]
)
def test_parquet(tmp_path: Path, ending: str, compress: Callable[[bytes], bytes]) -> None:
    texts = [*TEXTS, *(f"row {number}" * number for number in range(20)), "x" * (3 * CHUNK_BYTES), "last"]
    write_table(tmp_path / "plain.parquet", texts)
    path = tmp_path / f"a.parquet{ending}"
    path.write_bytes(compress((tmp_path / "plain.parquet").read_bytes()))
    steps: list[int] = []
    assert list(read_documents(path, steps.append)) == [text for text in texts if text]
    assert sum(steps) == path.stat().st_size


def pieces(path: Path, text_field: str = "text", maximum_bytes: int = 2 * CHUNK_BYTES) -> list[Document | Rejection]:
    chunks = read_chunks(path, text_field, maximum_bytes)
    return [piece for chunk in chunks for piece in parse_chunk(chunk, text_field)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-20]), "a.parquet cannot be read .*damaged or incomplete"),
        (lambda path: path.write_bytes(b"no table"), "a.parquet cannot be read .*damaged"),
        (lambda path: write_table(path, ["a"], "body"), r'no column "text" \(found \[\'other\', \'body\'\]\); name'),
        (
            lambda path: pyarrow.parquet.write_table(pyarrow.table({"text": [1]}), path),
            'column "text" has type int64; name one with strings by --text-field',
        ),
        (
            lambda path: pyarrow.parquet.write_table(
                pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, ["text", "text"]), path
            ),
            'a.parquet has 2 columns "text"; rename all but the one with the text',
        ),
        (lambda path: write_table(path, []), "a.parquet holds no document"),
        (lambda path: write_table(path, ["a", None]), "a.parquet, line 2: no text in this row"),
        (lambda path: write_table(path, ["a", "b\n\0"]), "a.parquet, line 2: NUL character"),
    ],
)
def test_bad_tables(tmp_path: Path, change: Callable[[Path], object], message: str) -> None:
    path = tmp_path / "a.parquet"
    write_table(path, ["a"] * 100)
    change(path)
    with pytest.raises(DataError, match=message) as error:
        read(path)
    assert "\n" not in str(error.value)


def test_the_text_can_have_another_name(tmp_path: Path) -> None:
    write_table(tmp_path / "a.parquet", ["a"], "body")
    (tmp_path / "a.jsonl").write_text('{"body": "a"}\n{"text": "b"}\n')
    assert pieces(tmp_path / "a.parquet", "body") == [Document(1, "a", b"a")]
    document, rejection = pieces(tmp_path / "a.jsonl", "body")
    assert document == Document(1, "a", b"a")
    assert isinstance(rejection, Rejection)
    assert (rejection.line, rejection.reason) == (2, "no text field")


def test_documents_that_are_too_long_are_left_out(tmp_path: Path) -> None:
    """One just fits, one is a byte too long, one ends the file; after each the lines are still counted right."""
    limit = 2 * CHUNK_BYTES
    fitting, long = "a" * (limit - len('{"text": ""}\n')), "b" * (2 * limit)
    lines = json_lines([])
    for text in ("first", fitting, fitting + "a", "between", long, "behind", long):
        lines += json.dumps({"text": text}).encode() + b"\n"
    for content in (lines, lines.rstrip()):
        (tmp_path / "a.jsonl").write_bytes(content)
        found = pieces(tmp_path / "a.jsonl")
        assert [piece.line for piece in found] == [1, 2, 3, 4, 5, 6, 7]
        assert [piece.line for piece in found if isinstance(piece, Rejection)] == [3, 5, 7]
        assert {piece.reason for piece in found if isinstance(piece, Rejection)} == {"too long"}
        assert found[2][-1] == f"{tmp_path}/a.jsonl, line 3: a document of more than 2 MiB; split it"
    write_table(tmp_path / "a.parquet", ["first", "a" * limit, "b" * (limit + 1), "last"])
    assert [piece.line for piece in pieces(tmp_path / "a.parquet") if isinstance(piece, Rejection)] == [3]
    (tmp_path / "a.txt").write_text("a" * (limit + 1))
    assert [piece.reason for piece in pieces(tmp_path / "a.txt")] == ["too long"]


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)),
    chunk_bytes=st.integers(1, 100),
    blank=st.sampled_from([b"", b"\n", b" \r\n"]),
)
def test_lines_survive_any_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str], chunk_bytes: int, blank: bytes
) -> None:
    monkeypatch.setattr("data.preparation.chunks.CHUNK_BYTES", chunk_bytes)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(blank + json.dumps({"text": line}).encode() + b"\n" for line in lines) + b"{")
    *documents, last = pieces(path)
    step = 2 if blank else 1
    assert [piece.line for piece in documents] == [step * (number + 1) for number in range(len(lines))]
    assert [piece.text for piece in documents if isinstance(piece, Document)] == lines
    assert isinstance(last, Rejection)
    assert (last.line, last.reason) == (step * len(lines) + 1, "malformed JSON")


@pytest.mark.parametrize(
    ("ending", "compress"),
    [(".xz", functools.partial(lzma.compress, preset=0)), (".gz", gzip.compress), (".zst", zstandard.compress)],
)
@pytest.mark.parametrize("cut", [True, False])
def test_damage_costs_little_of_what_comes_before(
    tmp_path: Path, ending: str, compress: Callable[[bytes], bytes], cut: bool
) -> None:
    """Some 100 KB, which a format packs together; chunks before it are the same as of the whole file."""
    generator = random.Random(0)
    texts = [generator.randbytes(generator.randrange(4000)).hex() for _ in range(600)]
    content = compress(json_lines(texts))
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(content)
    whole = list(read_chunks(path, "text"))
    assert CHUNK_BYTES - 8000 < len(whole[0].content) <= CHUNK_BYTES
    middle = len(content) * 3 // 4
    path.write_bytes(content[:middle] + (b"" if cut else b"\xff" * 2**18))
    *chunks, last = read_chunks(path, "text")
    assert chunks[0] == whole[0]
    found = [piece for chunk in chunks for piece in parse_chunk(chunk, "text")]
    sure = len(found) if cut else 400
    assert [piece.text for piece in found[:sure] if isinstance(piece, Document)] == texts[:sure]
    assert sum(map(len, texts[: len(found)])) > 0.75 * sum(map(len, texts)) - 2**17
    assert last.rejection is not None
    assert (last.rejection.reason, last.rejection.line) == ("damaged file", len(found) + 1)


def test_a_failing_disk_is_no_damaged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skipping damaged files must not skip what could not be read this once."""
    path = tmp_path / "a.parquet.gz"
    path.write_bytes(gzip.compress(b"a table"))
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr("data.preparation.chunks.tempfile.TemporaryFile", lambda: full)
        with pytest.raises(
            DataError, match=r"a.parquet.gz does not fit into .* unpacked; let TMPDIR name a larger disk"
        ):
            pieces(path)
    folder = tmp_path / "a.txt"
    folder.mkdir()
    monkeypatch.setattr("data.preparation.chunks.check_input_path", lambda path: path.suffix)
    with pytest.raises(DataError, match=r"a.txt cannot be read \(Is a directory\); see to the disk and try again"):
        pieces(folder)
