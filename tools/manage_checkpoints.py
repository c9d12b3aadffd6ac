"""Lists, verifies, prunes and explains the checkpoints of a run: tools/manage_checkpoints.py COMMAND RUN."""

import sys
from pathlib import Path

# Run as a script, the first entry of sys.path is this folder; the repository root must stand there instead.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse

from checkpoints.errors import CheckpointError
from checkpoints.inventory import explain, list_checkpoints, prune, verify
from tools.command_line import run
from train.run_directory import writer_of

COMMANDS = {
    "list": "each step with its size and age",
    "verify": "compare every file with its checksum; status 1 if any is damaged",
    "explain": "what a checkpoint holds and under which layout it was written",
    "prune": "delete all but the newest --keep and the multiples of --keep-every",
}


def main() -> int:
    """Carries out one command; returns the exit status."""
    parser = argparse.ArgumentParser(description="Looks after the checkpoints of a run.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("run", type=Path, metavar="RUN", help="folder of a run, such as runs/NAME")
        if name in ("verify", "explain"):
            command.add_argument("--step", type=int, help="only this step (default: all; explain: the newest)")
        if name == "prune":
            command.add_argument("--keep", type=int, default=2, help="newest checkpoints to keep (default: 2)")
            command.add_argument("--keep-every", type=int, help="also keep each step that is a multiple")
            command.add_argument("--dry-run", action="store_true", help="only say what would be deleted")
    arguments = parser.parse_args()
    if arguments.command == "list":
        print(list_checkpoints(arguments.run))
    elif arguments.command == "explain":
        print(explain(arguments.run, arguments.step))
    elif arguments.command == "prune":
        writer = None if arguments.dry_run else writer_of(arguments.run)
        if writer:
            raise CheckpointError(
                f"{arguments.run} is being written ({writer}) and retires checkpoints by checkpoint.keep_last; end the "
                "run first"
            )
        print(prune(arguments.run, arguments.keep, arguments.keep_every, arguments.dry_run))
    else:
        report, intact = verify(arguments.run, arguments.step)
        print(report)
        return 0 if intact else 1
    return 0


if __name__ == "__main__":
    run(main, CheckpointError)
