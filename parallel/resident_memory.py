"""How much memory of the machine this process has had."""

import resource
from pathlib import Path

STATUS = Path("/proc/self/status")  # where there is Linux


def peak_resident_bytes() -> int:
    """Most resident memory of this process since it was started, or since its peak was reset."""
    # Not ru_maxrss where it can be helped: it begins with the peak of the process that started this one.
    for line in STATUS.read_text("utf-8", "replace").splitlines() if STATUS.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
