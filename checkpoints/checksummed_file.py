"""Writes a safetensors file and computes its checksum meanwhile.

The library's writer leaves no way to see the bytes, and reading them again for a checksum takes longer than writing
them did. The format: a header's length (8 bytes, little-endian), the header (JSON, padded with spaces to 8 bytes), and
the tensors without gaps. The library reads it.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

ALIGNMENT = 8
PART_BYTES = 8 << 20


def write_checksummed(path: Path, tensors: dict[str, Tensor]) -> str:
    """Writes a new file and forces it to the disk.

    Args:
        path: the file.
        tensors: fp32, contiguous, in main memory, by name.

    Returns:
        SHA-256 of its contents, in hexadecimal.

    Raises:
        OSError: the disk refuses; what was written so far is left.
    """
    digest = hashlib.sha256()
    with ThreadPoolExecutor(1) as hashing, open(path, "wb", buffering=0) as file:
        for part in _parts(tensors):
            hashing.submit(digest.update, part)
            _write(file, part)
        os.fsync(file.fileno())
    return digest.hexdigest()


def _parts(tensors: dict[str, Tensor]) -> Iterator[memoryview]:
    yield memoryview(_header(tensors))
    for tensor in tensors.values():
        contents = tensor.numpy().data.cast("B")
        for start in range(0, len(contents), PART_BYTES):
            yield contents[start : start + PART_BYTES]


def _header(tensors: dict[str, Tensor]) -> bytes:
    entries, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        entries[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _write(file: BinaryIO, part: memoryview) -> None:
    while part:
        part = part[file.write(part) :]
