"""Finds tasks of lm-eval by name and loads their documents, all before there is a model."""

import contextlib
import difflib
import importlib.util
import logging
import sys
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
class SettingNames:
    """What the user calls the settings of tasks, for messages."""

    names: str
    data: str
    padding: str


COMMAND_LINE = SettingNames("--tasks", "--task-data", "--padding")
RUN_SETTINGS = SettingNames("tasks.names", "tasks.data", "tasks.padding")


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


def load_tasks(
    names: Sequence[str], folder: Path | None, others: Sequence[str] = (), called: SettingNames = COMMAND_LINE
) -> list[LoadedTask]:
    """Loads tasks.

    Args:
        names: Their names.
        folder: Where local files lie; None: lm-eval downloads what it does not have.
        others: Names that the user could have meant as well.
        called: What the user calls the settings.

    Raises:
        ConfigurationError: A name is unknown, the folder is missing, or lm-eval is.
        DataError: A local file is missing or wrong, or documents cannot be fetched.
    """
    _check_installed()
    with quiet():
        if folder is None:
            return _load_online(names, others, called)
        check_folder(folder, called.data)
        known = local_task_names()
        hint = f"; other tasks of lm-eval need {called.data} to be left out"
        for name in names:
            _check_name(name, known, others, called.names, hint)
        return [_load_local(name, folder, called) for name in names]


def check_scored(tasks: Sequence[LoadedTask], called: SettingNames) -> None:
    """Checks that tasks ask for scores of texts only.

    Raises:
        ConfigurationError: One generates text.
    """
    for loaded in tasks:
        for name, task in loaded.tasks["tasks"].items():
            if task.OUTPUT_TYPE == "generate_until":
                part = "" if name == loaded.name else f", part of {loaded.name},"
                raise ConfigurationError(
                    f"{called.names}: {name}{part} generates text, which is not offered here; leave it out"
                )


def _check_installed() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigurationError(
            'tasks of lm-evaluation-harness need lm-eval; install it with: pip install -e ".[evaluation]"'
        )


def _check_name(name: str, known: Sequence[str], others: Sequence[str], called: str, hint: str) -> None:
    if name in known:
        return
    near = difflib.get_close_matches(name, [*others, *known], SUGGESTIONS, cutoff=0.5)
    if not near and len(known) < 20:
        near = [*others, *known]
    likely = f"; near it are {', '.join(near)}" if near else ""
    raise ConfigurationError(f"{called} {name} is unknown{likely}{hint}")


def _load_online(names: Sequence[str], others: Sequence[str], called: SettingNames) -> list[LoadedTask]:
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    for name in names:
        _check_name(name, manager.all_tasks, others, called.names, "")
    return [LoadedTask(name, _load(manager, name, name, called), None) for name in names]


def _load_local(name: str, folder: Path, called: SettingNames) -> LoadedTask:
    from datasets import Dataset
    from lm_eval import tasks

    local = local_task(name)
    path = local.file(folder, name, called.data)
    documents, changes = local.read(path)
    # lm-eval reads its own file, so that prompts, targets and metrics are those of the installed version.
    config = tasks.manager.load_yaml(Path(tasks.__file__).parent / local.extends)
    splits = {"training_split": None, "validation_split": None, "test_split": "test", "num_fewshot": 0}
    config |= splits | changes | {"custom_dataset": lambda **_: {"test": Dataset.from_list(documents)}}
    return LoadedTask(name, _load(tasks.TaskManager(include_defaults=False), config, name, called), path.name)


def _load(manager: Any, what: Any, name: str, called: SettingNames) -> Any:
    try:
        loaded = manager.load([what])
    except Exception as error:  # Tasks and dataset builders raise anything.
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(
            f"task {name} cannot be loaded ({reason}); check the network, or give local files with {called.data}"
        ) from error
    for one, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise ConfigurationError(f"task {one} runs code that the model writes, or shows it images; leave it out")
    return loaded


@contextlib.contextmanager
def quiet(bars: bool = True) -> Iterator[None]:
    """Keeps lm-eval from telling what it does.

    Args:
        bars: Whether to let it show bars where there is a terminal.
    """
    import lm_eval.api.task as task_module
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from tqdm import tqdm

    logger = logging.getLogger("lm_eval")
    level, were_disabled = logger.level, are_progress_bars_disabled()
    hides_bars = not (bars and sys.stderr.isatty())
    logger.setLevel(logging.ERROR)
    task_module.tqdm = partial(tqdm, disable=hides_bars)
    if hides_bars:
        disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        task_module.tqdm = tqdm
        if hides_bars and not were_disabled:
            enable_progress_bars()
