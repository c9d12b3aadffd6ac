"""Tasks of lm-eval on local files: its own prompts, targets and metrics, and documents of the user."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from data.errors import DataError
from parallel.errors import ConfigurationError

TASKS = Path(__file__).parent / "tasks"


class Layout(BaseModel):
    """One form of a task's documents.

    Attributes:
        fields: What each document has.
        config: Changes to lm-eval's task for this form.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    fields: tuple[str, ...]
    config: dict[str, Any] = {}


class LocalTask(BaseModel):
    """A task whose documents are read from a file of JSON lines.

    Attributes:
        extends: lm-eval's own file of the task, in its folder of tasks.
        files: Names of the file; the first that exists is read.
        layouts: Forms of its documents; the first that fits the first document holds for all.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    extends: str
    files: tuple[str, ...]
    layouts: tuple[Layout, ...]

    def file(self, folder: Path, name: str, called: str) -> Path:
        """The file in a folder.

        Args:
            folder: Where the user's files lie.
            name: Of the task, for messages.
            called: What the user calls the setting of the folder, for messages.

        Raises:
            DataError: There is none.
        """
        found = next((folder / file for file in self.files if (folder / file).is_file()), None)
        if found is None:
            raise DataError(f"{called} {folder} has no {' or '.join(self.files)}, which {name} reads; put it there")
        return found

    def read(self, path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Reads and checks a file.

        Returns:
            The documents, each with the fields of its layout, and the layout's changes to the task.

        Raises:
            DataError: The file cannot be read, is empty, or a line is no document.
        """
        layout: Layout | None = None
        documents = []
        for number, document in _lines(path):
            layout = layout or next((one for one in self.layouts if document.keys() >= set(one.fields)), None)
            if layout is None or not document.keys() >= set(layout.fields):
                forms = " or ".join(", ".join(one.fields) for one in ([layout] if layout else self.layouts))
                raise DataError(f"{path} line {number} has the fields {', '.join(document)}, and needs {forms}")
            documents.append({field: document[field] for field in layout.fields})
        if layout is None:
            raise DataError(f"{path} holds no documents; put one JSON object on each line")
        return documents, layout.config


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file of JSON lines, each with its line number."""
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _parse(path, number, line)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text ({error}); fetch it again") from None


def _parse(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        document = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path} line {number} is no JSON ({error}); fetch it again") from None
    if not isinstance(document, dict):
        raise DataError(f"{path} line {number} is no JSON object; put one document on each line")
    return document


def local_task_names() -> list[str]:
    """Names of the tasks that can be read from local files."""
    return sorted(path.stem for path in TASKS.glob("*.yaml"))


def local_task(name: str) -> LocalTask:
    """One of them by name."""
    return LocalTask.model_validate(yaml.safe_load((TASKS / f"{name}.yaml").read_text(encoding="utf-8")))


def check_folder(folder: Path, called: str) -> None:
    """Checks that the folder of local files is there.

    Args:
        folder: Where it should be.
        called: What the user calls its setting, for messages.

    Raises:
        ConfigurationError: It is no folder.
    """
    if not folder.is_dir():
        raise ConfigurationError(f"{called} {folder} is not a folder; give one with files such as piqa_valid.jsonl")
