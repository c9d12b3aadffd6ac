"""Configuration files: bases, overrides and paths."""

from pathlib import Path

import pytest
import yaml

from parallel.errors import ConfigurationError
from train.config import REPOSITORY
from train.config_file import config_text, load_config

QUICKSTART = REPOSITORY / "configs" / "quickstart.yaml"


def test_resolved_text_loads_to_the_same_config(tmp_path: Path) -> None:
    config = load_config(QUICKSTART, ["train.steps=700", "optimizer.learning_rate=1e-3"])
    path = tmp_path / "resolved.yaml"
    path.write_text(config_text(config))
    assert load_config(path) == config
    assert config.train.steps == 700
    assert config.optimizer.learning_rate == 1e-3


def test_base_is_merged_section_by_section(tmp_path: Path) -> None:
    own = {"run": {"name": "child"}, "model": {"block_decoder": {"num_layers": 5}}}
    (tmp_path / "child.yaml").write_text(yaml.safe_dump({"base": str(QUICKSTART), **own}))
    child, parent = load_config(tmp_path / "child.yaml"), load_config(QUICKSTART)
    assert child.run.name == "child"
    assert child.model.blocks.num_layers == 5
    assert child.model.blocks.hidden_size == parent.model.blocks.hidden_size
    assert child.train == parent.train


def test_of_several_bases_later_ones_win_and_own_values_win_over_all(tmp_path: Path) -> None:
    (tmp_path / "deep.yaml").write_text("train: {steps: 1, micro_batch_size: 2}")
    (tmp_path / "size.yaml").write_text("base: deep.yaml\nmodel: {block_decoder: {num_layers: 5}}")
    (tmp_path / "batch.yaml").write_text("train: {steps: 700, global_batch_size: 6}")
    bases = [str(QUICKSTART), "size.yaml", "batch.yaml"]
    own = {"run": {"name": "child"}, "train": {"global_batch_size": 16}}
    (tmp_path / "child.yaml").write_text(yaml.safe_dump({"base": bases, **own}))
    child = load_config(tmp_path / "child.yaml")
    assert (child.train.steps, child.train.micro_batch_size, child.train.global_batch_size) == (700, 2, 16)
    assert child.model.blocks.num_layers == 5
    assert child.optimizer == load_config(QUICKSTART).optimizer


@pytest.mark.parametrize("base", [7, {"a": "b.yaml"}, ["a.yaml", None]])
def test_a_base_that_is_no_file_name_is_an_error(base: object, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"run": {"name": "a"}}))
    (tmp_path / "child.yaml").write_text(yaml.safe_dump({"base": base}))
    with pytest.raises(ConfigurationError, match=r"child.yaml: base=.* is not the name of a file"):
        load_config(tmp_path / "child.yaml")


def test_base_circle_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: b.yaml")
    (tmp_path / "b.yaml").write_text("base: a.yaml")
    with pytest.raises(ConfigurationError, match="names itself as its base"):
        load_config(tmp_path / "a.yaml")


def test_relative_paths_start_at_the_repository_or_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(QUICKSTART)
    assert config.data.path == str(REPOSITORY / "runs" / "quickstart-data" / "shards")
    assert config.directory == REPOSITORY / "runs" / "quickstart"
    moved = load_config(QUICKSTART, ["data.path=shards", "run.root=out"])
    assert moved.data.path == str(tmp_path / "shards")
    assert moved.directory == tmp_path / "out" / "quickstart"


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("parallel.activation_checkpointing=layer", "nothing to compile with parallel.activation_checkpointing=layer"),
        ("parallel.zero_stage=3", "does not go with parallel.zero_stage=3"),
    ],
)
def test_layers_that_cannot_be_compiled(layout: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"train\.compile_layers=true.*{message}.*set that to"):
        load_config(QUICKSTART, ["train.compile_layers=true", layout])


def test_several_mistakes_are_all_named() -> None:
    with pytest.raises(ConfigurationError, match=r"train\.steps=-1.*unknown field optimizer\.lr"):
        load_config(QUICKSTART, ["train.steps=-1", "optimizer.lr=1"])


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("train.learning_rate=1", "optimizer.learning_rate"),
        ("optimizer.lr=1", "optimizer.learning_rate"),
        ("parallel.tensors=2", "parallel.tensor"),
        ("model.block_decoder.layers=2", "model.block_decoder.num_layers"),
        ("trainer.steps=3", "train"),
    ],
)
def test_unknown_fields_get_a_field_as_hint(override: str, nearest: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"the nearest is {nearest}$"):
        load_config(QUICKSTART, [override])


@pytest.mark.parametrize(
    "name", ["optimizer.learning_rate", "optimizer.clip_gradient_norm", "model.backbone.rotary_base"]
)
def test_infinite_numbers_are_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name}=inf is not allowed: input should be a finite number"):
        load_config(QUICKSTART, [f"{name}=.inf"])


def test_home_folder_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_config(QUICKSTART, ["data.path=~/shards"]).data.path == str(tmp_path / "shards")


def test_resolved_text_keeps_long_paths_on_one_line(tmp_path: Path) -> None:
    """The Slurm script reads it line by line."""
    path = tmp_path / ("a folder " * 20)
    text = config_text(load_config(QUICKSTART, [f"data.path={path}"]))
    assert str(path).strip() in text.replace("'", "")
