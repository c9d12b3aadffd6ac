"""docs/config.md is what the settings say."""

import subprocess
import sys
from pathlib import Path

import pytest

import tools.document_config
from train.config import RunConfig
from train.config_file import field_names
from train.config_reference import config_reference

ROOT = Path(__file__).resolve().parents[2]


def test_document_is_up_to_date() -> None:
    command = [sys.executable, ROOT / "tools" / "document_config.py", "--check"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_an_outdated_document_is_noticed_and_rewritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = tmp_path / "docs" / "config.md"
    monkeypatch.setattr(tools.document_config, "DOCUMENT", document)
    monkeypatch.setattr(sys, "argv", ["document_config.py", "--check"])
    assert tools.document_config.main() == 1
    assert not document.exists()
    monkeypatch.setattr(sys, "argv", ["document_config.py"])
    assert tools.document_config.main() == 0
    assert document.read_text() == config_reference()
    document.write_text(config_reference().replace("1e-08", "1e-07"))
    monkeypatch.setattr(sys, "argv", ["document_config.py", "--check"])
    assert tools.document_config.main() == 1


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
