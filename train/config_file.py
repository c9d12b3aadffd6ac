"""Reads a run's YAML file, applies `section.field=value` overrides, and reports mistakes in one sentence each."""

import difflib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from data.config import is_remote
from parallel.errors import ConfigurationError
from train.config import REPOSITORY, RunConfig

# Fields that hold a path, and sections; * stands for every name.
PATH_FIELDS = (
    "run.root",
    "run.initial_weights",
    "data.path",
    "data.sources.*.path",
    "data.tokenizer",
    "data.cache.directory",
    "tasks.data",
)


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Loads and checks a run's configuration.

    A file may name another one in `base`, or a list of them, relative to itself; later ones win over earlier ones, and
    its own values over all. Relative paths in a file start at the repository, those in overrides at the working
    directory.

    Args:
        path: YAML file with the sections of RunConfig.
        overrides: `section.field=value`, value in YAML.

    Raises:
        ConfigurationError: naming the field, its value and the fix.
    """
    values = _read_yaml(path)
    _resolve_paths(values, REPOSITORY)
    for override in overrides:
        _apply(values, override)
    _resolve_paths(values, Path.cwd())
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigurationError(f"config {path}: {explain(error)}") from None


def recorded_config(path: Path) -> RunConfig:
    """The configuration that a run has recorded in its folder.

    Raises:
        ConfigurationError: there is none, or it is not of this version.
    """
    try:
        return RunConfig.model_validate(_read_yaml(path))
    except ValidationError as error:
        raise ConfigurationError(f"config {path}: {explain(error)}") from None


def _resolve_paths(values: dict[str, Any], folder: Path) -> None:
    """Makes the relative paths among the values absolute, in place."""
    for name in PATH_FIELDS:
        *sections, field = name.split(".")
        for section in _sections(values, sections):
            if isinstance(section.get(field), str) and not is_remote(section[field]):
                # A shell leaves the ~ of data.path=~/shards alone.
                section[field] = str(folder / os.path.expanduser(section[field]))


def _sections(values: dict[str, Any], names: list[str]) -> list[dict[str, Any]]:
    """Copies of the sections of that name, put in the place of the originals."""
    sections = [values]
    for name in names:
        parents, sections = sections, []
        for parent in parents:
            for key in list(parent) if name == "*" else [name]:
                if isinstance(parent.get(key), dict):
                    parent[key] = dict(parent[key])
                    sections.append(parent[key])
    return sections


def config_text(config: RunConfig) -> str:
    """The configuration as YAML, with all defaults filled in; each value stands on one line."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=math.inf)


def _read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ConfigurationError(f"config {path} names itself as its base; remove the circle")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigurationError(f"config {path} does not exist; configs/ holds the shipped ones") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigurationError(f"config {path} cannot be read as YAML: {reason}") from None
    if not isinstance(values, dict):
        raise ConfigurationError(f"config {path} must hold sections such as model: and train:, not {values!r}")
    merged: dict[str, Any] = {}
    for base in _bases(values.pop("base", None), path):
        merged = _merge(merged, _read_yaml(path.parent / base, (*seen, path.resolve())))
    return _merge(merged, values)


def _bases(value: Any, path: Path) -> list[str]:
    bases = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(base, str) for base in bases):
        raise ConfigurationError(f"config {path}: base={value!r} is not the name of a file or a list of such names")
    return bases


def _merge(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if both else value
    return merged


def _apply(values: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    if not separator or not name:
        raise ConfigurationError(f"override {override!r} is not section.field=value, such as train.steps=100")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigurationError(f"override {override!r}: {text!r} is not a YAML value; quote it") from None
    *sections, leaf = name.split(".")
    target = values
    for section in sections:
        inner = target.get(section)
        target[section] = inner = dict(inner) if isinstance(inner, dict) else {}
        target = inner
    target[leaf] = value


def explain(error: ValidationError) -> str:
    """What is wrong with a configuration, in words that name each field and its value."""
    return "; ".join(_sentence(item["loc"], item) for item in error.errors())


def _sentence(location: tuple[int | str, ...], item: Any) -> str:
    name = ".".join(map(str, location))
    if item["type"] == "extra_forbidden":
        return f"unknown field {name}; the nearest is {_nearest_field(name)}"
    if item["type"] == "missing":
        return f"{name} is missing; set it in the file or with {name}=VALUE"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{name}: {message}" if name else message
    return f"{name}={item['input']!r} is not allowed: {message[0].lower()}{message[1:]}"


def _nearest_field(name: str) -> str:
    """The field of that name in another section, or else the most similar one in the same section."""
    known = list(field_names(RunConfig))
    section, _, leaf = name.rpartition(".")
    elsewhere = [field for field in known if field.rpartition(".")[2] == leaf]
    siblings = {field.rpartition(".")[2]: field for field in known if field.rpartition(".")[0] == section}
    if not siblings:  # inside a section of a name or number of its own: data.sources.NAME
        parent = section.rpartition(".")[0] + "."
        siblings = {field.rpartition(".")[2]: field for field in known if field.startswith(parent)}
    return (elsewhere or [siblings[match] for match in difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.0)])[0]


def field_names(model: type[BaseModel], prefix: str = "") -> dict[str, None]:
    """Dotted names of all fields of a settings model, sections included, in order."""
    names: dict[str, None] = {}
    for name, field in model.model_fields.items():
        names[prefix + name] = None
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                names |= field_names(kind, f"{prefix}{name}.")
    return names
