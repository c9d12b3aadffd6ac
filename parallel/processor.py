"""What the operating system says of the processor."""

import functools
from pathlib import Path


@functools.cache
def processor_entry(*names: str) -> str:
    """The value of the first line of /proc/cpuinfo with one of the names; empty where there is no such line or file.

    Args:
        names: such as "vendor_id", or "flags" and what other architectures call them.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    entries = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in entries if name.strip() in names), "")
