"""docs/config.md is what the settings say, and the table of docs/models.md what the files in configs/ say."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tools.document_config
from train.config import RunConfig
from train.config_file import field_names
from train.config_reference import config_reference

ROOT = Path(__file__).resolve().parents[2]


def test_documents_are_up_to_date() -> None:
    command = [sys.executable, ROOT / "tools" / "document_config.py", "--check"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", ["config.md", "models.md"])
def test_an_outdated_document_is_noticed_and_rewritten(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tools.document_config, "DOCUMENTS", tmp_path)
    for document in ("config.md", "models.md"):
        shutil.copy(ROOT / "docs" / document, tmp_path)
    good = (tmp_path / name).read_text()
    (tmp_path / name).write_text(good.replace("1e-08", "1e-07").replace("173.16M", "173.17M"))
    monkeypatch.setattr(sys, "argv", ["document_config.py", "--check"])
    assert tools.document_config.main() == 1
    assert f"{name} is out of date" in capsys.readouterr().err
    assert (tmp_path / name).read_text() != good
    monkeypatch.setattr(sys, "argv", ["document_config.py"])
    assert tools.document_config.main() == 0
    assert (tmp_path / name).read_text() == good


def test_every_field_has_a_row_or_a_section() -> None:
    text = config_reference()
    repeated = ("model.token_decoder.", "model.decoder.")  # described once, under model.block_decoder
    for name in field_names(RunConfig):
        if not name.startswith(repeated):
            assert f"| `{name.rpartition('.')[2]}` |" in text or f"## {name}\n" in text, name


def test_rows_show_types_bounds_and_defaults() -> None:
    lines = config_reference().splitlines()
    assert "| `name` | text | required | Name of the run; its folder is `root`/`name`. |" in lines
    assert "| `root` | path | `runs` | Folder that holds all runs. |" in lines
    assert [line for line in lines if line.startswith("| `ffn_hidden_size` | integer or null, >= 1 | `null` |")]
    assert [line for line in lines if line.startswith("| `zero_stage` | `0`, `1`, `2`, `3` | `1` |")]
    assert [line for line in lines if line.startswith("| `sequence_parallel` | true or false | `false` |")]
