"""What a node of a job is like, and which nodes differ from the others. Imports nothing heavy."""

import hashlib
import importlib.metadata
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VISIBLE_SECONDS = 5.0  # network file systems show a new file to other nodes after a while
MAXIMUM_SKEW_SECONDS = 5.0
BYTES_PER_PARAMETER = 12  # of a checkpoint: the fp32 weight and two moments


@dataclass(frozen=True)
class NodeFacts:
    """One node.

    Attributes:
        node: its name.
        software: digest of each source file and version of each package.
        gpus: GPUs that torch sees.
        free_bytes: space for the run's folder.
        problem: what is wrong with the run's folder, if anything.
    """

    node: str
    software: dict[str, str]
    gpus: int
    free_bytes: int
    problem: str | None = None


def software() -> dict[str, str]:
    """Digests of the source files and configurations of this repository, and the versions of all packages."""
    folders = [path.parent for path in ROOT.glob("*/__init__.py") if path.parent.name != "tests"]
    files = [path for folder in folders for path in folder.rglob("*.py")] + list((ROOT / "configs").rglob("*.yaml"))
    found = {path.relative_to(ROOT).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in files}
    packages = {f"package {one.name}": one.version for one in importlib.metadata.distributions()}
    return found | packages | {"Python": sys.version.split()[0]}


def leave_mark(run: Path, name: str, text: str) -> str | None:
    """Writes a file into the run's folder; returns what is wrong, if anything."""
    try:
        (run / name).write_text(text, encoding="utf-8")
    except OSError as error:
        return f"cannot write in {run}: {error.strerror}"
    return None


def find_mark(run: Path, name: str, text: str) -> str | None:
    """Reads the file that another node wrote; returns what is wrong, if anything."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while time.monotonic() < deadline:
        with suppress(OSError):
            if (run / name).read_text(encoding="utf-8") == text:
                return None
        time.sleep(0.2)
    return f"does not see in {run} what the first node wrote there: it is not a shared folder"


def free_bytes(run: Path) -> int:
    """Free space of the run's folder; 0 where it cannot be told."""
    try:
        return shutil.disk_usage(run).free
    except OSError:
        return 0


def problems(nodes: Sequence[NodeFacts], expected_gpus: int, parameters: int) -> list[str]:
    """What is wrong with the nodes, a sentence for each.

    Args:
        nodes: all nodes of the job.
        expected_gpus: GPUs that each was asked for.
        parameters: of the model; there must be space for two checkpoints.
    """
    usual = _usual_software(nodes)
    needed = 2 * BYTES_PER_PARAMETER * parameters
    found = []
    for one in nodes:
        if one.problem:
            found.append(f"node {one.node} {one.problem}")
        elif one.gpus != expected_gpus:
            found.append(f"node {one.node} shows {one.gpus} of the {expected_gpus} GPUs of this job to torch")
        elif one.free_bytes < needed:
            found.append(
                f"node {one.node} has {one.free_bytes / 1e9:.1f} GB free in the run's folder, two checkpoints need "
                f"{needed / 1e9:.1f} GB; free space or change run.root"
            )
        elif one.software != usual.software:
            found.append(f"node {one.node} {_difference(one, usual)}")
    return found


def _usual_software(nodes: Sequence[NodeFacts]) -> NodeFacts:
    """The first node that has what most of them have."""
    counts = Counter(tuple(sorted(one.software.items())) for one in nodes)
    most_common = dict(counts.most_common(1)[0][0])
    return next(one for one in nodes if one.software == most_common)


def _difference(one: NodeFacts, usual: NodeFacts) -> str:
    names = sorted(one.software.keys() | usual.software.keys())
    different = [name for name in names if one.software.get(name) != usual.software.get(name)]
    name, rest = different[0], len(different) - 1
    what = f"has another {name}" + (
        f" ({one.software.get(name, 'none')})" if not name.endswith((".py", ".yaml")) else ""
    )
    return (
        f"{what} than node {usual.node}"
        + (f", and {rest} more differences" if rest else "")
        + ("; update its code and packages")
    )


def skew(sent: float, there: float, received: float) -> float:
    """Seconds by which a clock is certainly off that read `there` between `sent` and `received` here."""
    return max(sent - there, there - received, 0.0)
