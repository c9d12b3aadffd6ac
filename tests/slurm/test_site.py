"""The values of a site: where they come from, and mistakes in them."""

from pathlib import Path

import pytest

from parallel.errors import ConfigurationError
from slurm.site import SITE_FILE, SiteSettings, read_site


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "site.conf"
    path.write_text(
        "# Our cluster.\n SITE_PARTITION='gpu' # the fast one\nSITE_QOS=\n\nSITE_GPUS_PER_NODE=8\nRUN_NAME=of_scripts\n"
    )
    return path


def test_the_environment_wins_over_the_file(file: Path) -> None:
    assert read_site({}, file) == SiteSettings(partition="gpu", gpus_per_node=8)
    found = read_site({"SITE_PARTITION": "", "SITE_TIME": "1-00:00:00", "SITE_VENV": "env", "OTHER": "1"}, file)
    assert found == SiteSettings(partition="gpu", gpus_per_node=8, time="1-00:00:00", venv=Path("env"))
    assert read_site({}, file.parent / "absent") == SiteSettings()


def test_the_example_is_readable() -> None:
    read_site({}, SITE_FILE.with_name("site.conf.example"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("SITE_PARTITON=x", "unknown name SITE_PARTITON"),
        ("partition gpu", "line 7: 'partition gpu' is not NAME=VALUE"),
        ("SITE_NODES=0", "SITE_NODES='0': input should be greater"),
        ("SITE_TIME=tomorrow", "SITE_TIME='tomorrow': is not a time limit such as 24:00:00"),
    ],
)
def test_mistakes(file: Path, line: str, message: str) -> None:
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(ConfigurationError, match=message):
        read_site({}, file)


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("10:30", 11), ("24:00:00", 1440), ("2-0", 2880), ("1-2:30", 1590), ("1-00:00:01", 1441)],
)
def test_time_limits_in_minutes(text: str, minutes: int) -> None:
    assert SiteSettings(time=text).minutes == minutes
