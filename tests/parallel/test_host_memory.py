"""Freed memory stays with the process: taking it again costs no page faults."""

import subprocess
import sys

import pytest

from parallel.host_memory import keep_freed_memory

TAKE_AND_FREE = """
import resource, sys
sys.path.insert(0, {root!r})
from parallel.host_memory import keep_freed_memory
if {keeps}:
    assert keep_freed_memory()
import ctypes
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
for turn in range(6):
    if turn == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(2**26)
    ctypes.memset(block, 1, 2**26)
    libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(root: str, keeps: bool) -> int:
    script = TAKE_AND_FREE.format(root=root, keeps=keeps)
    return int(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks the GNU C library")
def test_memory_is_taken_from_the_system_once(pytestconfig: pytest.Config) -> None:
    root = str(pytestconfig.rootpath)
    assert page_faults(root, keeps=False) > 1000
    assert page_faults(root, keeps=True) < 100


def test_another_c_library_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> object:
        raise OSError(name)

    monkeypatch.setattr("ctypes.CDLL", fail)
    assert not keep_freed_memory()
