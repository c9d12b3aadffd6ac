"""Reads Zstandard files of one or many frames; the library's own reader takes a cut file for a complete one."""

import io
from typing import BinaryIO

import zstandard

# Unpacked at once: what a damaged file may lose of what comes before the damage.
CHUNK_BYTES = 1 << 14


class ZstandardStream(io.RawIOBase):
    """Decompressed bytes of a file; give it to io.BufferedReader to read lines.

    Args:
        file: The compressed file, open in binary mode; it stays open.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._frame_begun = False
        self._pending = memoryview(b"")

    def readable(self) -> bool:
        """Whether one can read; always."""
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """Fills the buffer with decompressed bytes; 0 at the end of the file.

        Raises:
            zstandard.ZstdError: The data is damaged.
            EOFError: The file ends within a frame.
        """
        while not self._pending:
            compressed = self._frame.unused_data or self._file.read(CHUNK_BYTES)
            if not compressed:
                if self._frame_begun and not self._frame.eof:
                    raise EOFError("the file ends within a frame")
                return 0
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._frame_begun = True
            self._pending = memoryview(self._frame.decompress(compressed))
        size = min(len(buffer), len(self._pending))
        buffer[:size] = self._pending[:size]
        self._pending = self._pending[size:]
        return size
