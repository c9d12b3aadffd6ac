"""Shows where runs stand: tools/status.py RUN..."""

import sys
from pathlib import Path

# Run as a script, the first entry of sys.path is this folder; the repository root must stand there instead.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse

from checkpoints.errors import CheckpointError
from parallel.errors import ConfigurationError
from tools.command_line import run
from train.status import describe, read_status


def main() -> None:
    """Prints a few lines about each run."""
    parser = argparse.ArgumentParser(description="Shows where runs stand and why their last attempt ended.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, such as runs/NAME")
    for folder in parser.parse_args().runs:
        print(describe(read_status(folder)))


if __name__ == "__main__":
    run(main, ConfigurationError, CheckpointError)
