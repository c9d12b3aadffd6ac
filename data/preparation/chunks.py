"""Cuts input files, plain or compressed, into chunks of whole raw lines or rows, without looking into them."""

import contextlib
import errno
import gzip
import io
import lzma
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import pyarrow
import zstandard
from pyarrow import parquet

from data.errors import DataError
from data.preparation.inputs import COMPRESSIONS, check_input_path
from data.preparation.zstandard_stream import ZstandardStream

CHUNK_BYTES = 2**20
# Unpacked at once: what a damaged file may lose of what comes before the damage.
PIECE_BYTES = 2**16
# A long novel has 3 MiB; tokenizers take up to 130 bytes of memory for each of a text.
MAXIMUM_DOCUMENT_BYTES = 2**24
UTF8_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError, pyarrow.ArrowException)


class Rejection(NamedTuple):
    """A piece of input that gives no document.

    Attributes:
        file: The input file.
        line: Its first line, or row of a table, from 1 on.
        reason: What is wrong, in two or three words to count by.
        message: The whole sentence for the user, with file, line and fix.
    """

    file: str
    line: int
    reason: str
    message: str


@dataclass(frozen=True)
class Chunk:
    """A piece of one file.

    Attributes:
        path: The file.
        kind: `.txt` (content is one document), `.jsonl` (content is lines) or `.parquet` (content is rows).
        first_line: Number of the first line or row.
        content: Raw lines, or the bytes of the text in each row, None where there is none.
        consumed: Bytes of the file that were read up to the end of the chunk.
        rejection: Instead of content: what stood here and could not be read.
    """

    path: Path
    kind: str
    first_line: int
    content: bytes | list[bytes | None]
    consumed: int
    rejection: Rejection | None = None

    @property
    def next_line(self) -> int:
        """Number of the line or row after the chunk."""
        if isinstance(self.content, list):
            return self.first_line + len(self.content)
        return self.first_line + self.content.count(b"\n") + (not self.content.endswith(b"\n"))


def read_chunks(path: Path, text_field: str, maximum_bytes: int = MAXIMUM_DOCUMENT_BYTES) -> Iterator[Chunk]:
    """Reads a file from its beginning.

    Args:
        path: An input file.
        text_field: The column with the text in parquet files.
        maximum_bytes: Longer documents are rejected, so that memory stays bounded.

    Yields:
        The chunks in order. Damage of the file is a rejection, and the last chunk.

    Raises:
        DataError: The path is no input file, a parquet file has no such column, or a disk fails or is full.
    """
    kind = check_input_path(path)
    next_line, consumed, blank = 1, 0, True
    try:
        reader = (
            _read_table(path, text_field, maximum_bytes) if kind == ".parquet" else _read(path, kind, maximum_bytes)
        )
        for chunk in reader:
            next_line, consumed = chunk.next_line, chunk.consumed
            blank = blank and kind == ".jsonl" and isinstance(chunk.content, bytes) and chunk.content.isspace()
            yield chunk
    except READ_ERRORS as error:
        if isinstance(error, OSError) and error.errno is not None:
            # The file may be fine, so nobody may skip it.
            raise DataError(f"{path} cannot be read ({error.strerror}); see to the disk and try again") from error
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        message = f"{path} cannot be read ({first_line}); it is damaged or incomplete, fetch it again"
        yield _rejected(path, kind, consumed, Rejection(str(path), next_line, "damaged file", message))
        return
    if blank:
        message = f"{path} holds no document; remove it from the inputs or give it content"
        yield _rejected(path, kind, consumed, Rejection(str(path), next_line, "empty file", message))


def _rejected(path: Path, kind: str, consumed: int, rejection: Rejection) -> Chunk:
    return Chunk(path, kind, rejection.line, b"", consumed, rejection)


def _too_long(path: Path, kind: str, line: int, consumed: int, maximum_bytes: int) -> Chunk:
    message = f"{path}, line {line}: a document of more than {maximum_bytes >> 20} MiB; split it"
    return _rejected(path, kind, consumed, Rejection(str(path), line, "too long", message))


def _read(path: Path, kind: str, maximum_bytes: int) -> Iterator[Chunk]:
    with open(path, "rb") as file, _decompress(path, file) as stream:
        if kind == ".jsonl":
            yield from _read_lines(path, file, stream, maximum_bytes)
            return
        content = stream.read(maximum_bytes + 1)
        if len(content) > maximum_bytes:
            yield _too_long(path, kind, 1, file.tell(), maximum_bytes)
        elif text := content.removeprefix(UTF8_BYTE_ORDER_MARK):
            yield Chunk(path, kind, 1, text, file.tell())


def _blocks(stream: io.BufferedIOBase) -> Iterator[bytes]:
    """Reads blocks of the same size, the last one shorter; of a damaged stream first all that comes before."""
    pieces: list[bytes] = []
    size = 0
    damage = None
    try:
        while piece := stream.read1(min(PIECE_BYTES, CHUNK_BYTES - size)):
            pieces.append(piece)
            size += len(piece)
            if size == CHUNK_BYTES:
                yield b"".join(pieces)
                pieces, size = [], 0
    except READ_ERRORS as error:
        damage = error
    if pieces:
        yield b"".join(pieces)
    if damage is not None:
        raise damage


def _read_lines(path: Path, file: BinaryIO, stream: io.BufferedIOBase, maximum_bytes: int) -> Iterator[Chunk]:
    line = 1
    parts: list[bytes] = []  # The beginning of a line whose end has not been read; of one too long, nothing is kept.
    size = 0
    for number, whole in enumerate(_blocks(stream)):
        block = whole if number else whole.removeprefix(UTF8_BYTE_ORDER_MARK)
        first = block.find(b"\n") + 1
        if first and size + first > maximum_bytes:
            yield _too_long(path, ".jsonl", line, file.tell(), maximum_bytes)
            line, parts, size, block = line + 1, [], 0, block[first:]
        if end := block.rfind(b"\n") + 1:
            chunk = Chunk(path, ".jsonl", line, b"".join([*parts, block[:end]]), file.tell())
            yield chunk
            line, parts, size, block = chunk.next_line, [], 0, block[end:]
        size += len(block)
        parts = [*parts, block] if size <= maximum_bytes else []
    if size > maximum_bytes:
        yield _too_long(path, ".jsonl", line, file.tell(), maximum_bytes)
    elif size:
        yield Chunk(path, ".jsonl", line, b"".join(parts), file.tell())


def _read_table(path: Path, text_field: str, maximum_bytes: int) -> Iterator[Chunk]:
    with contextlib.ExitStack() as stack:
        source: Path | BinaryIO = path
        if path.suffix.lower() in COMPRESSIONS:  # A table is read from its end, so it must be unpacked first.
            source = cast(BinaryIO, stack.enter_context(tempfile.TemporaryFile()))
            _unpack(path, source)
        table = stack.enter_context(parquet.ParquetFile(source))
        rows = max(table.metadata.num_rows, 1)
        line = 1
        for batch in table.iter_batches(_rows_per_chunk(path, table, text_field), columns=[text_field]):
            texts = batch.column(0).cast(pyarrow.binary()).to_pylist()
            consumed = path.stat().st_size * (line - 1 + len(texts)) // rows
            yield from _cut_rows(path, line, texts, consumed, maximum_bytes)
            line += len(texts)


def _unpack(path: Path, target: BinaryIO) -> None:
    try:
        with open(path, "rb") as file, _decompress(path, file) as stream:
            shutil.copyfileobj(stream, target, CHUNK_BYTES)
        target.flush()
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        folder = tempfile.gettempdir()
        raise DataError(f"{path} does not fit into {folder} unpacked; let TMPDIR name a larger disk") from error


def _rows_per_chunk(path: Path, table: "parquet.ParquetFile", text_field: str) -> int:
    schema = table.schema_arrow
    if schema.names.count(text_field) > 1:
        raise DataError(
            f'{path} has {schema.names.count(text_field)} columns "{text_field}"; rename all but the one with the text'
        )
    if text_field not in schema.names:
        raise DataError(
            f'{path} has no column "{text_field}" (found {schema.names[:8]}); name the right one by --text-field'
        )
    kind = schema.field(text_field).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise DataError(f'{path}: column "{text_field}" has type {kind}; name one with strings by --text-field')
    index = table.metadata.schema.names.index(text_field)
    groups = [table.metadata.row_group(number) for number in range(table.metadata.num_row_groups)]
    size = sum(group.column(index).total_uncompressed_size for group in groups)
    return min(max(CHUNK_BYTES * table.metadata.num_rows // max(size, 1), 1), 8192)


def _cut_rows(
    path: Path, first_line: int, texts: list[bytes | None], consumed: int, maximum_bytes: int
) -> Iterator[Chunk]:
    """Cuts a batch where its rows are longer than the average promised, and takes out what is too long."""
    start, size = 0, 0
    for index, text in enumerate(texts):
        length = len(text or b"")
        if length > maximum_bytes:
            if index > start:
                yield Chunk(path, ".parquet", first_line + start, texts[start:index], consumed)
            yield _too_long(path, ".parquet", first_line + index, consumed, maximum_bytes)
            start, size = index + 1, 0
        elif size > CHUNK_BYTES:
            yield Chunk(path, ".parquet", first_line + start, texts[start:index], consumed)
            start, size = index, length
        else:
            size += length
    if start < len(texts):
        yield Chunk(path, ".parquet", first_line + start, texts[start:], consumed)


def _decompress(path: Path, file: io.BufferedReader) -> io.BufferedIOBase:
    ending = path.suffix.lower()
    if ending == ".xz":
        return lzma.open(file, "rb")
    if ending == ".gz":
        return gzip.open(file, "rb")
    if ending == ".zst":
        return io.BufferedReader(ZstandardStream(file))
    return file
