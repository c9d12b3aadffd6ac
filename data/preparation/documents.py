"""Streams documents out of text and JSON Lines files, plain or compressed."""

import contextlib
import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

import zstandard

from data.errors import DataError
from data.preparation.zstandard_stream import ZstandardStream

COMPRESSIONS = (".xz", ".gz", ".zst")
FORMATS = (".txt", ".jsonl")
UTF8_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_documents(path: Path, progress: Callable[[int], object] | None = None) -> Iterator[str]:
    """Yields the documents of one file in order; documents without any text are skipped.

    Args:
        path: A `.txt` file (one document) or a `.jsonl` file (one object with a `text` field a line), optionally
            with `.xz`, `.gz` or `.zst` appended.
        progress: Called with the number of bytes of the file consumed since its last call.

    Yields:
        The text of each document, exactly as stored.

    Raises:
        DataError: The file is missing, empty, of an unknown kind, damaged, binary, or not as described above.
    """
    kind = check_input_path(path)
    found, consumed = False, 0
    with _damage_as_data_error(path), open(path, "rb") as file, _decompress(path, file) as stream:
        texts = _read_json_lines(path, stream) if kind == ".jsonl" else _read_text(path, stream)
        for text in texts:
            found = True
            if progress is not None:
                progress(file.tell() - consumed)
                consumed = file.tell()
            yield text
    if not found:
        raise DataError(f"{path} holds no document; remove it from the inputs or give it content")


def check_input_path(path: Path) -> str:
    """Checks that a path can be an input, without reading it.

    Args:
        path: The input file.

    Returns:
        `.txt` or `.jsonl`.

    Raises:
        DataError: The path is no readable file or has an unknown ending.
    """
    if not path.exists():
        raise DataError(f"input file {path} does not exist; check the path")
    if not path.is_file():
        raise DataError(f"input {path} is not a file; name the files in it instead, for example {path}/*.jsonl")
    if not os.access(path, os.R_OK):
        raise DataError(f"input file {path} cannot be read; change its permissions")
    suffixes = path.suffixes
    kind = suffixes[-2] if len(suffixes) > 1 and suffixes[-1] in COMPRESSIONS else path.suffix
    if kind not in FORMATS:
        raise DataError(
            f"input file {path} is of an unknown kind; its name must end in .txt or .jsonl, "
            "optionally followed by .xz, .gz or .zst"
        )
    return kind


def _read_text(path: Path, stream: BinaryIO) -> Iterator[str]:
    text = _decode(path, 1, stream.read().removeprefix(UTF8_BYTE_ORDER_MARK))
    if text:
        yield text


def _read_json_lines(path: Path, stream: BinaryIO) -> Iterator[str]:
    for number, line in enumerate(stream, start=1):
        if number == 1:
            line = line.removeprefix(UTF8_BYTE_ORDER_MARK)
        if line.isspace() or not line:
            continue
        text = _text_field(path, number, _decode(path, number, line))
        if text:
            yield text


def _text_field(path: Path, number: int, line: str) -> str:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(
            f"{path}, line {number}: malformed JSON ({error}); write one JSON object a line, or repair this line"
        ) from None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        found = f"the fields {sorted(record)[:8]}" if isinstance(record, dict) else f"a JSON {type(record).__name__}"
        raise DataError(
            f'{path}, line {number}: no "text" field with a string (found {found}); '
            'each line must be an object like {"text": "..."}'
        )
    text: str = record["text"]
    _check_text(path, number, text)
    return text


def _decode(path: Path, first_line: int, content: bytes) -> str:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + content.count(b"\n", 0, error.start)
        raise DataError(
            f"{path}, line {line}: byte 0x{content[error.start]:02x} is not valid UTF-8 text; "
            "convert the file to UTF-8, or remove it if it is binary"
        ) from None
    _check_text(path, first_line, text)
    return text


def _check_text(path: Path, first_line: int, text: str) -> None:
    """Refuses characters that no text has: NUL marks a binary file, a lone surrogate has no UTF-8 form."""
    nul = text.find("\0")
    if nul >= 0:
        line = first_line + text.count("\n", 0, nul)
        raise DataError(f"{path}, line {line}: NUL character, so this is no text; remove the file or the character")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{path}, line {first_line}: unpaired surrogate U+{ord(text[error.start]):04X}, which is no character; "
            "remove it"
        ) from None


def _decompress(path: Path, file: BinaryIO) -> BinaryIO:
    if path.suffix == ".xz":
        return cast(BinaryIO, lzma.open(file, "rb"))
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(file, "rb"))
    if path.suffix == ".zst":
        return cast(BinaryIO, io.BufferedReader(ZstandardStream(file)))
    return file


@contextlib.contextmanager
def _damage_as_data_error(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
        raise DataError(f"{path} cannot be read ({error}); it is damaged or incomplete, fetch it again") from error
