"""What /proc/cpuinfo is read for."""

import platform
from collections.abc import Iterator
from pathlib import Path

import pytest

from parallel.processor import processor_entry

CPUINFO = """processor	: 0
vendor_id	: GenuineIntel
model name	: Xeon: a processor
flags		: fpu vme

vendor_id	: other
"""


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    processor_entry.cache_clear()
    yield
    processor_entry.cache_clear()


def test_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: CPUINFO)
    assert processor_entry("vendor_id") == "GenuineIntel"
    assert processor_entry("model name") == "Xeon: a processor"
    assert processor_entry("Features", "flags") == "fpu vme"
    assert processor_entry("flag") == ""


def test_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert processor_entry("vendor_id") == ""


def test_this_processor() -> None:
    x86 = platform.machine() == "x86_64"  # other architectures name no vendor
    assert bool(processor_entry("vendor_id")) == x86
    assert ("sse2" in processor_entry("flags").split()) == x86
