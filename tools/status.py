"""Shows where runs stand: tools/status.py RUN..."""

import sys
from pathlib import Path

# Run as a script, the first entry of sys.path is this folder; the repository root must stand there instead.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse

from checkpoints.errors import CheckpointError
from parallel.errors import ConfigurationError
from slurm.overview import overview, runs_in
from tools.command_line import USER_ERROR_STATUS, run


def main() -> int:
    """Prints a few lines about each run; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Shows where runs stand, how fast they get on, and why their last attempt ended."
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, such as runs/NAME, or of several, as runs"
    )
    folders = [folder for given in parser.parse_args().runs for folder in runs_in(given)]
    status = 0
    for folder in folders:
        try:
            print(overview(folder), flush=True)
        except (ConfigurationError, CheckpointError) as error:  # one that is damaged does not hide the others
            print(f"error: {error}", file=sys.stderr)
            status = USER_ERROR_STATUS
    return status


if __name__ == "__main__":
    run(main, ConfigurationError, CheckpointError)
