"""Durable, atomic file writing and checksums."""

import hashlib
import os
from pathlib import Path


def fsync_path(path: Path) -> None:
    """Flushes a file or a directory entry to the disk.

    Args:
        path: An existing file or directory.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that its name only ever shows the old or the complete new content.

    Args:
        path: File to create or replace.
        content: All bytes of the file.
    """
    # The process id keeps writers on one machine apart; a leftover of a killed one is overwritten or ignored.
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def sha256_of_file(path: Path) -> str:
    """Computes the hexadecimal SHA-256 of a file's content.

    Args:
        path: File to read.

    Returns:
        64 hexadecimal digits.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
