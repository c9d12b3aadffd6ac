"""Reads a sweep: a YAML list of points, each of which changes some settings of one configuration.

- {run.name: small_rate, optimizer.learning_rate: 1.0e-4}
- {run.name: large_rate, optimizer.learning_rate: 1.0e-3}
"""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from parallel.errors import ConfigurationError
from train.config import RunConfig
from train.config_file import load_config

NAME = "run.name"


def sweep_runs(config: Path, overrides: Sequence[str], sweep: Path) -> list[RunConfig]:
    """The runs of a sweep, all of them checked.

    Args:
        config: YAML file that all points share.
        overrides: changes to it, as on the command line; a point's own win.
        sweep: the file of points.

    Raises:
        ConfigurationError: naming the point; two have the same run.name, or need different numbers of processes.
    """
    runs = []
    for number, point in enumerate(_read(sweep), start=1):
        try:
            runs.append(load_config(config, [*overrides, *(f"{name}={_text(value)}" for name, value in point.items())]))
        except ConfigurationError as error:
            raise ConfigurationError(f"{sweep}, point {number}: {error}") from None
    folders = Counter(run.directory for run in runs)
    twice = [folder.name for folder, count in folders.items() if count > 1]
    if twice:
        raise ConfigurationError(f"{sweep}: several points have {NAME}={twice[0]}; each run needs a name of its own")
    sizes = sorted({run.parallel.world_size for run in runs})
    if len(sizes) > 1:
        raise ConfigurationError(
            f"{sweep}: the points need {' and '.join(map(str, sizes))} processes; the jobs of an array are of one "
            "size, so make a sweep of each"
        )
    return runs


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        points = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigurationError(f"sweep {path} does not exist; it is a YAML list of points") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigurationError(f"sweep {path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(points, list) or not points:
        raise ConfigurationError(
            f"sweep {path} must be a list of points such as `- {{run.name: a, optimizer.learning_rate: 1.0e-3}}`"
        )
    for number, point in enumerate(points, start=1):
        if not isinstance(point, dict) or not isinstance(point.get(NAME), str):
            raise ConfigurationError(f"{path}, point {number}: {point!r} is no mapping with a {NAME} of its own")
    return points


def _text(value: Any) -> str:
    """A value as YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("...\n").strip()
