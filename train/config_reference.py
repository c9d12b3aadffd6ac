"""Every field of a run's configuration as Markdown, from the settings models themselves."""

import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from train.config import REPOSITORY, RunConfig

HEADER = """# Configuration

Every field of a run's YAML file, written by `python tools/document_config.py` from the descriptions in the code.
On the command line a field is `section.field=value`, such as `model.block_decoder.num_layers=4`. A file may name
another one in `base`, relative to itself, and state only what differs; `base` may be a list, where later files win over
earlier ones. Relative paths start at the repository if they stand in a file, and at the working directory if they stand
on the command line.
"""
# How pydantic's metadata names bounds, and how they are shown.
BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def config_reference() -> str:
    """The whole document."""
    return "\n".join([HEADER, *_section("", RunConfig)])


def _section(name: str, model: type[BaseModel]) -> list[str]:
    """A heading and a table for a settings model, then the same for those inside it; each kind once."""
    rows, inner = [], []
    for field_name, field in model.model_fields.items():
        nested = _nested_model(field.annotation)
        full_name = f"{name}.{field_name}" if name else field_name
        if nested is not None:
            inner.append((full_name + _key(field.annotation), nested))
        if name:
            rows.append(_row(field_name, field))
    lines: list[str] = []
    if name:
        lines = [
            f"## {name}",
            "",
            _summary(model),
            "",
            "| field | value | default | meaning |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    seen: dict[type[BaseModel], str] = {}
    for full_name, nested in inner:
        if nested in seen:
            lines += [f"## {full_name}", "", f"As `{seen[nested]}`.", ""]
        else:
            seen[nested] = full_name
            lines += _section(full_name, nested)
    return lines


def _summary(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").strip().partition("\n")[0]


def _row(name: str, field: FieldInfo) -> str:
    default = "required" if field.is_required() else f"`{_yaml(field.default)}`"
    return f"| `{name}` | {_value(field)} | {default} | {field.description} |"


def _yaml(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, Path):
        return str(value.relative_to(REPOSITORY))
    if isinstance(value, tuple):
        return str(list(value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _key(annotation: Any) -> str:
    """What stands between a field's name and the fields of the sections inside it."""
    return {dict: ".NAME", tuple: "[]"}.get(get_origin(annotation), "")


def _value(field: FieldInfo) -> str:
    """Type and bounds of a field."""
    bounds = [
        f"{sign} {getattr(item, name)}"
        for item in field.metadata
        for name, sign in BOUNDS.items()
        if getattr(item, name, None) is not None
    ]
    return ", ".join([_type(field.annotation), *bounds])


def _type(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join("null" if part is type(None) else _type(part) for part in get_args(annotation))
    if get_origin(annotation) is dict:
        return f"{_type(get_args(annotation)[1])} by name"
    if get_origin(annotation) is tuple:
        return f"list of {_type(get_args(annotation)[0])}s"
    names = {int: "integer", float: "number", bool: "true or false", str: "text"}
    if _nested_model(annotation) is not None:
        return "section"
    return names.get(annotation, "path")


def _nested_model(annotation: Any) -> type[BaseModel] | None:
    """The settings model that a field holds, optional or not."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None
