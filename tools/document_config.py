"""Writes docs/config.md from the descriptions of all settings: tools/document_config.py [--check]."""

import sys
from pathlib import Path

# Run as a script, the first entry of sys.path is this folder; the repository root must stand there instead.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse

from tools.command_line import run
from train.config_reference import config_reference

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "config.md"


def main() -> int:
    """Writes the document; with --check only says whether it is up to date, with status 1 if not."""
    parser = argparse.ArgumentParser(description="Writes docs/config.md from the descriptions of all settings.")
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if the file is out of date")
    arguments = parser.parse_args()
    text = config_reference()
    if not arguments.check:
        DOCUMENT.parent.mkdir(exist_ok=True)
        DOCUMENT.write_text(text, encoding="utf-8")
        return 0
    if DOCUMENT.is_file() and DOCUMENT.read_text(encoding="utf-8") == text:
        return 0
    print(f"{DOCUMENT} is out of date; write it again with: python tools/document_config.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    run(main)
