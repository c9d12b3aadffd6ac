"""Output files appear whole, and nothing else changes."""

import errno
import os
from pathlib import Path

import pytest

from parallel.errors import ConfigurationError
from tools.output_file import check_output_file, write_output_file


def test_neighbours_and_links_stay(tmp_path: Path) -> None:
    place = tmp_path / "folder" / "real.yaml"
    place.parent.mkdir()
    link, neighbour = tmp_path / "link.yaml", tmp_path / "link.yaml.new"
    link.symlink_to(place)
    neighbour.write_text("another's")
    check_output_file(link)
    assert not place.exists()
    write_output_file(link, "text")
    assert (place.read_text(), neighbour.read_text()) == ("text", "another's")
    assert link.is_symlink()
    assert [one.name for one in place.parent.iterdir()] == ["real.yaml"]


def test_what_is_no_file_is_written_to_as_it_is() -> None:
    check_output_file(Path("/dev/null"))
    write_output_file(Path("/dev/null"), "text")
    assert Path("/dev/null").is_char_device()


def test_what_cannot_be_written_is_said_before_and_after(tmp_path: Path) -> None:
    for action in (check_output_file, lambda path: write_output_file(path, "text")):
        with pytest.raises(ConfigurationError, match=r"nowhere/file cannot be written \(No such file or directory\)"):
            action(tmp_path / "nowhere" / "file")
        with pytest.raises(ConfigurationError, match="cannot be written"):
            action(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "constants.yaml"
    write_output_file(path, "whole")

    def full_disk(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(ConfigurationError, match="No space left"):
        write_output_file(path, "another")
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]
