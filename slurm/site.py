"""What a site's cluster wants to be told: from the environment, or from `slurm/site.conf`; the environment wins.

The job scripts of this folder read the same file by the same rules (`_run.sh`).
"""

import re
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from parallel.errors import ConfigurationError

SITE_FILE = Path(__file__).resolve().parent / "site.conf"
PREFIX = "SITE_"
LINE = re.compile(r"(\w+)=(.*)")
# What only the job scripts use; a job from Python has its own ways to say it.
OF_SCRIPTS = frozenset({"SITE_PREFLIGHT", "SITE_MIN_ALLREDUCE_GBPS", "RUN_NAME", "RUN_CONFIG"})
# Slurm's own ways to write a time limit: minutes, m:s, h:m:s, d-h, d-h:m, d-h:m:s.
TIME = re.compile(r"(?:(?P<days>\d+)-(?P<of_day>\d+(?::\d+){0,2})|(?P<plain>\d+(?::\d+){0,2}))")


class SiteSettings(BaseModel):
    """Values that a job takes from the site; each is `SITE_` and its name in capitals."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    account: str | None = Field(default=None, description="Account to charge.")
    partition: str | None = Field(default=None, description="Partition; by default the cluster's own default.")
    qos: str | None = Field(default=None, description="Quality of service.")
    nodes: int | None = Field(
        default=None, ge=1, description="Nodes; told by the layout where the tasks of a node are."
    )
    gpus_per_node: int | None = Field(default=None, ge=0, description="GPUs of a node; 0 or none: train on CPU.")
    tasks_per_node: int | None = Field(default=None, ge=1, description="Processes of a node; by default one per GPU.")
    cpus_per_task: int | None = Field(default=None, ge=1, description="Cores of a process.")
    time: str = Field(default="24:00:00", description="Time limit of a job; the run goes on in the next one.")
    venv: Path | None = Field(default=None, description="Python environment; by default the one that submits.")
    container: str | None = Field(default=None, description="Image for srun's --container-image (pyxis).")
    container_mounts: str | None = Field(default=None, description="Mounts of the container, as SOURCE:TARGET,...")
    setup: Path | None = Field(default=None, description="File to source first, for modules and network settings.")

    @field_validator("time")
    @classmethod
    def _is_time(cls, text: str) -> str:
        if TIME.fullmatch(text) is None:
            raise ValueError("is not a time limit such as 24:00:00, 1-12:00:00 or 90 (minutes)")
        return text

    @property
    def minutes(self) -> int:
        """The time limit in minutes, seconds rounded up."""
        match = TIME.fullmatch(self.time)
        assert match is not None
        if match["days"]:
            hours, minutes, seconds = _three(match["of_day"].split(":"))
            hours += 24 * int(match["days"])
        else:
            parts = match["plain"].split(":")
            hours, minutes, seconds = _three(parts if len(parts) == 3 else ["0", *parts])
        return 60 * hours + minutes + (seconds > 0)


def _three(parts: list[str]) -> tuple[int, int, int]:
    first, second, third = (*map(int, parts), 0, 0, 0)[:3]
    return first, second, third


def read_site(environment: Mapping[str, str], path: Path = SITE_FILE) -> SiteSettings:
    """Reads the site's values.

    Args:
        environment: variables such as SITE_PARTITION; an empty one counts as not set.
        path: a file of lines such as SITE_PARTITION=gpu, which may be missing; # begins a comment, quotes are dropped.

    Raises:
        ConfigurationError: a line, a name or a value is not allowed.
    """
    names = {PREFIX + name.upper(): name for name in SiteSettings.model_fields}
    values = _read_file(path) if path.is_file() else {}
    unknown = sorted(values.keys() - names.keys() - OF_SCRIPTS)
    if unknown:
        raise ConfigurationError(f"{path}: unknown name {unknown[0]}; slurm/site.conf.example describes the known ones")
    values |= {name: environment[name] for name in names if environment.get(name)}
    try:
        return SiteSettings.model_validate(
            {names[name]: value for name, value in values.items() if name in names and value}
        )
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigurationError(
            f"{PREFIX}{str(first['loc'][0]).upper()}={first['input']!r}: {message[0].lower()}{message[1:]}; change it "
            f"in the environment or in {path}"
        ) from None


def _read_file(path: Path) -> dict[str, str]:
    values = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from None
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = LINE.fullmatch(text)
        if match is None:
            raise ConfigurationError(f"{path}, line {number}: {text!r} is not NAME=VALUE")
        values[match[1]] = match[2].replace('"', "").replace("'", "")
    return values
