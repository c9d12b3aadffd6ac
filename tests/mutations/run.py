"""Plants each bug of mutations.py in a copy of the repository and shows which test turns red: make mutations.

Usage: python -m tests.mutations.run [TEXT]        only the mutations whose name contains TEXT
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from parallel.extensions import use_extension_cache
from tests.mutations.mutations import MUTATIONS, ROOT, Mutation

TIMEOUT_SECONDS = 900
TESTS_FAILED = 1  # pytest's exit status; others mean that it could not run


class Outcome(NamedTuple):
    """What pytest said.

    Attributes:
        status: its exit status.
        failed: names of the tests that failed.
        output: all it printed.
    """

    status: int
    failed: list[str]
    output: str


def copy_repository(folder: Path) -> None:
    """Copies every file that git tracks or would track."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def run_tests(folder: Path, *selection: str) -> Outcome:
    """Runs tests of the copy with this Python and its packages."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-rf", "-p", "no:cacheprovider", "-W", "ignore", *selection],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    failed = re.findall(r"^FAILED (.+?)(?: - .*)?$", result.stdout, flags=re.MULTILINE)
    return Outcome(result.returncode, failed, result.stdout)


def plant(folder: Path, mutation: Mutation) -> Outcome:
    """Runs a mutation's tests with the bug in place, then takes it out again."""
    path = folder / mutation.file
    original = path.read_text()
    path.write_text(mutation.mutate(original))
    try:
        return run_tests(folder, mutation.tests)
    finally:
        path.write_text(original)


def main() -> int:
    """Checks that the tests pass without any bug, then plants one after the other; status 1 if one goes unnoticed."""
    part = sys.argv[1] if len(sys.argv) > 1 else ""
    chosen = [mutation for mutation in MUTATIONS if part in mutation.name]
    if not chosen:
        print(f"error: no planted bug has {part!r} in its name; see docs/testing.md", file=sys.stderr)
        return 2
    use_extension_cache()  # the copy must not build DeepSpeed's op again
    unnoticed = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "repository"
        copy_repository(folder)
        clean = run_tests(folder, *sorted({mutation.tests for mutation in chosen}))
        if clean.status != 0:
            print(f"{clean.output}\nerror: these tests must pass before a bug is planted", file=sys.stderr)
            return 2
        print("| planted bug | file | test that turns red | seconds |\n|---|---|---|---|", flush=True)
        for mutation in chosen:
            started = time.monotonic()
            outcome = plant(folder, mutation)
            red = outcome.status == TESTS_FAILED and bool(outcome.failed)
            unnoticed += not red
            shown = f"`{outcome.failed[0]}`" if red else f"NONE (pytest ended with status {outcome.status})"
            seconds = time.monotonic() - started
            print(f"| {mutation.name} | `{mutation.file}` | {shown} | {seconds:.0f} |", flush=True)
    return int(unnoticed > 0)


if __name__ == "__main__":
    sys.exit(main())
