"""Writes docs/config.md and the table of docs/models.md: tools/document_config.py [--check]."""

import sys
from pathlib import Path

# Run as a script, the first entry of sys.path is this folder; the repository root must stand there instead.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse

from parallel.errors import ConfigurationError
from tools.command_line import run
from train.config_reference import config_reference
from train.model_table import with_table

REPOSITORY = Path(__file__).resolve().parent.parent
DOCUMENTS = REPOSITORY / "docs"


def main() -> int:
    """Writes the documents; with --check only says whether they are up to date, with status 1 if not."""
    parser = argparse.ArgumentParser(
        description="Writes docs/config.md from the descriptions of all settings, and the table of docs/models.md from "
        "the files in configs/."
    )
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if a file is out of date")
    arguments = parser.parse_args()
    models = DOCUMENTS / "models.md"
    texts = {
        DOCUMENTS / "config.md": config_reference(),
        models: with_table(models.read_text(encoding="utf-8"), REPOSITORY / "configs"),
    }
    outdated = [path for path, text in texts.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in outdated:
        if arguments.check:
            print(f"{path} is out of date; write it again with: python tools/document_config.py", file=sys.stderr)
        else:
            path.write_text(texts[path], encoding="utf-8")
    return 1 if arguments.check and outdated else 0


if __name__ == "__main__":
    run(main, ConfigurationError)
