"""Turns raw chunks of input files into documents."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from data.errors import DataError
from data.preparation.chunks import Chunk, Rejection, read_chunks

TEXT_FIELD = "text"


class Document(NamedTuple):
    """A text as it stands in a file.

    Attributes:
        line: Its line, or row of a table, from 1 on.
        text: The text.
        utf8: The same, encoded.
    """

    line: int
    text: str
    utf8: bytes


class _MalformedError(Exception):
    """A text that is none: why, and how many lines after its first."""

    def __init__(self, reason: str, message: str, line: int = 0) -> None:
        super().__init__(message)
        self.reason = reason
        self.line = line


def read_documents(path: Path, progress: Callable[[int], object] | None = None) -> Iterator[str]:
    """Yields the documents of one file in order; documents without any text are skipped.

    Args:
        path: A `.txt` file (one document), a `.jsonl` file (one object with a `text` field a line) or a `.parquet` file
            (with a column `text`), optionally with `.xz`, `.gz` or `.zst` appended.
        progress: Called with the number of bytes of the file consumed since its last call.

    Yields:
        The text of each document, exactly as stored.

    Raises:
        DataError: The file is missing, empty, of an unknown kind, damaged, binary, or not as described above.
    """
    found, consumed = False, 0
    for chunk in read_chunks(path, TEXT_FIELD):
        for piece in parse_chunk(chunk, TEXT_FIELD):
            if isinstance(piece, Rejection):
                raise DataError(piece.message)
            if progress is not None:
                progress(chunk.consumed - consumed)
                consumed = chunk.consumed
            if piece.text:
                found = True
                yield piece.text
    if not found:
        raise DataError(f"{path} holds no document; remove it from the inputs or give it content")


def parse_chunk(chunk: Chunk, text_field: str) -> Iterator[Document | Rejection]:
    """Finds the documents of a chunk.

    Args:
        chunk: A piece of a file.
        text_field: The field with the text in `.jsonl` files.

    Yields:
        In order, documents, some of which may have no text, and what is malformed. Blank lines are left out.
    """
    if chunk.rejection is not None:
        yield chunk.rejection
    elif isinstance(chunk.content, list):
        for line, row in enumerate(chunk.content, start=chunk.first_line):
            yield _document(chunk.path, line, _text_of_row, row)
    elif chunk.kind == ".txt":
        yield _document(chunk.path, 1, _text_of_file, chunk.content)
    else:
        for line, raw in enumerate(chunk.content.split(b"\n"), start=chunk.first_line):
            if raw and not raw.isspace():
                yield _document(chunk.path, line, _text_of_json, raw, text_field)


def _document(path: Path, line: int, read: Callable[..., str], *arguments: object) -> Document | Rejection:
    try:
        text = read(*arguments)
        return Document(line, text, text.encode("utf-8"))
    except UnicodeEncodeError as error:
        surrogate = f"U+{ord(error.object[error.start]):04X}"
        message = f"{path}, line {line}: unpaired surrogate {surrogate}, which is no character; remove it"
        return Rejection(str(path), line, "unpaired surrogate", message)
    except _MalformedError as error:
        return Rejection(str(path), line + error.line, error.reason, f"{path}, line {line + error.line}: {error}")


def _text_of_file(content: bytes) -> str:
    text = _decode(content)
    _refuse_nul(text, text.count("\n", 0, text.find("\0")))
    return text


def _text_of_row(content: bytes | None) -> str:
    if content is None:
        raise _MalformedError("no text field", "no text in this row; fill it in or leave the row out")
    text = _decode(content)
    _refuse_nul(text)
    return text


def _text_of_json(raw: bytes, text_field: str) -> str:
    try:
        record = json.loads(_decode(raw))
    except (ValueError, RecursionError) as error:  # An integer of thousands of digits is a plain ValueError.
        message = f"malformed JSON ({error}); write one JSON object a line, or repair this line"
        raise _MalformedError("malformed JSON", message) from None
    if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
        found = f"the fields {sorted(record)[:8]}" if isinstance(record, dict) else f"a JSON {type(record).__name__}"
        message = (
            f'no "{text_field}" field with a string (found {found}); '
            f'each line must be an object like {{"{text_field}": "..."}}, or name its field by --text-field'
        )
        raise _MalformedError("no text field", message)
    text: str = record[text_field]
    _refuse_nul(text)
    return text


def _decode(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        message = (
            f"byte 0x{content[error.start]:02x} is not valid UTF-8 text; "
            "convert the file to UTF-8, or remove it if it is binary"
        )
        raise _MalformedError("not UTF-8", message, content.count(b"\n", 0, error.start)) from None


def _refuse_nul(text: str, line: int = 0) -> None:
    """NUL marks a binary file."""
    if "\0" in text:
        message = "NUL character, so this is no text; remove the file or the character"
        raise _MalformedError("NUL character", message, line)
