"""Finds tasks of lm-eval by name and loads their documents, all before there is a model."""

import contextlib
import difflib
import importlib.util
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data.errors import DataError
from evaluation.harness.local_tasks import check_folder, local_task, local_task_names
from parallel.errors import ConfigurationError

SUGGESTIONS = 5


@dataclass(frozen=True)
class LoadedTask:
    """A task or group of tasks with its documents.

    Attributes:
        name: As the user gave it.
        tasks: What lm-eval makes of it: its `TaskDict`.
        source: File of the documents; None if lm-eval fetched them.
    """

    name: str
    tasks: Any
    source: str | None


def load_tasks(names: Sequence[str], folder: Path | None, others: Sequence[str] = ()) -> list[LoadedTask]:
    """Loads tasks.

    Args:
        names: Their names.
        folder: Where local files lie; None: lm-eval downloads what it does not have.
        others: Names that the user could have meant as well.

    Raises:
        ConfigurationError: A name is unknown, the folder is missing, or lm-eval is.
        DataError: A local file is missing or wrong, or documents cannot be fetched.
    """
    _check_installed()
    with quiet():
        if folder is None:
            return _load_online(names, others)
        check_folder(folder)
        known = local_task_names()
        for name in names:
            _check_name(name, known, others, "; other tasks of lm-eval need --task-data to be left out")
        return [_load_local(name, folder) for name in names]


def _check_installed() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigurationError(
            'tasks of lm-evaluation-harness need lm-eval; install it with: pip install -e ".[evaluation]"'
        )


def _check_name(name: str, known: Sequence[str], others: Sequence[str], hint: str) -> None:
    if name in known:
        return
    near = difflib.get_close_matches(name, [*others, *known], SUGGESTIONS, cutoff=0.5)
    if not near and len(known) < 20:
        near = [*others, *known]
    likely = f"; near it are {', '.join(near)}" if near else ""
    raise ConfigurationError(f"--tasks {name} is unknown{likely}{hint}")


def _load_online(names: Sequence[str], others: Sequence[str]) -> list[LoadedTask]:
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    for name in names:
        _check_name(name, manager.all_tasks, others, "")
    return [LoadedTask(name, _load(manager, name, name), None) for name in names]


def _load_local(name: str, folder: Path) -> LoadedTask:
    from datasets import Dataset
    from lm_eval import tasks

    local = local_task(name)
    path = local.file(folder, name)
    documents, changes = local.read(path)
    # lm-eval reads its own file, so that prompts, targets and metrics are those of the installed version.
    config = tasks.manager.load_yaml(Path(tasks.__file__).parent / local.extends)
    splits = {"training_split": None, "validation_split": None, "test_split": "test", "num_fewshot": 0}
    config |= splits | changes | {"custom_dataset": lambda **_: {"test": Dataset.from_list(documents)}}
    return LoadedTask(name, _load(tasks.TaskManager(include_defaults=False), config, name), path.name)


def _load(manager: Any, what: Any, name: str) -> Any:
    try:
        loaded = manager.load([what])
    except Exception as error:  # Tasks and dataset builders raise anything.
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(
            f"task {name} cannot be loaded ({reason}); check the network, or give local files with --task-data"
        ) from error
    for one, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise ConfigurationError(f"task {one} runs code that the model writes, or shows it images; leave it out")
    return loaded


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps lm-eval from telling what it does, and from bars where there is no terminal."""
    import lm_eval.api.task as task_module
    from tqdm import tqdm

    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    task_module.tqdm = partial(tqdm, disable=None)
    try:
        yield
    finally:
        logger.setLevel(level)
        task_module.tqdm = tqdm
