"""File operations that survive a power loss, and their errors in words."""

import errno
import hashlib
import os
import re
import shutil
from pathlib import Path

from checkpoints.errors import CheckpointError

HASH_BLOCK_BYTES = 1 << 22
FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
NOT_WRITABLE = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
# Some network file systems refuse fsync on directories; their renames are ordered by the server.
NO_DIRECTORY_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP})


def sync_file(path: Path) -> None:
    """Force the contents of a file to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Force the entries of a directory to the disk."""
    try:
        sync_file(path)
    except OSError as error:
        if error.errno not in NO_DIRECTORY_SYNC:
            raise


def write_durably(path: Path, text: str) -> None:
    """Write a new text file and force it to the disk."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's contents, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def storage_error(path: Path, error: OSError, needed: int | None = None) -> CheckpointError:
    """Turn a failed write into one sentence with the fix.

    Args:
        path: What was being written.
        error: What the system answered.
        needed: Size of the write in bytes, where known.
    """
    wanted = "" if needed is None else f"{needed} bytes needed, "
    cause = error.strerror or str(error)
    if error.errno in FULL_DISK:
        fix = "free space, raise the quota, or keep fewer checkpoints"
    elif error.errno in NOT_WRITABLE:
        fix = "make the directory writable or choose another one for the run"
    else:
        fix = "check the file system, older checkpoints are untouched"
    return CheckpointError(f"cannot write {path} ({wanted}{_free_bytes(path)} bytes free): {cause}; {fix}")


def as_os_error(error: Exception) -> OSError:
    """The system's error behind an exception; safetensors gives its number only in words."""
    if isinstance(error, OSError):
        return error
    number = re.search(r"os error (\d+)", str(error))
    return OSError(int(number.group(1)) if number else errno.EIO, str(error))


def _free_bytes(path: Path) -> int:
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.is_dir())
    return shutil.disk_usage(existing).free
