"""tools/uptrain_from_vanilla.py as a user runs it: real commands, real processes, mistakes, a second run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from checkpoints.errors import CheckpointError
from checkpoints.fragments import FragmentReader
from checkpoints.store import CheckpointStore
from parallel.errors import ConfigurationError
from tests.tools.outcomes import assert_one_clear_error
from tests.tools.vanilla_model import WIDTH, save_vanilla_model
from tests.train.small_run import prepare_small_corpus, small_run
from tools.uptrain_from_vanilla import main
from train.config_file import config_text

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "uptrain_from_vanilla.py"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_small_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def vanilla(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vanilla_model(tmp_path_factory.mktemp("vanilla"))


def target(root: Path, corpus: Path, **sections: dict[str, Any]) -> Path:
    """A run of 140 steps, of which uptraining takes 14, at a learning rate that changes nothing visible."""
    model = {"embedder": {"kind": "lookup_projection"}}
    defaults = {"model": model, "train": {"steps": 140}, "optimizer": {"learning_rate": 1e-9, "weight_decay": 0.0}}
    path = root / "target.yaml"
    path.write_text(config_text(small_run(root / "runs", corpus, "target", **{**defaults, **sections})))
    return path


def uptrain(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_trains_a_fraction_from_the_vanilla_weights(tmp_path: Path, corpus: Path, vanilla: Path) -> None:
    config = target(tmp_path, corpus)
    result = uptrain("--vanilla", vanilla, "--config", config)
    assert result.returncode == 0, result.stderr
    assert "token_decoder.layers.1.attention.dense.weight <- vanilla.layers.2.attention.dense.weight" in result.stdout
    assert "run target: complete at step 14" in result.stdout
    folder = tmp_path / "runs" / "target"
    record = json.loads((folder / "initial_weights" / "uptraining.json").read_text())
    assert record["layers"] == "partition"
    assert record["origins"]["token_decoder.input.expansion.weight"] == "identity, repeated"
    assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["steps"] == 14
    source = load_file(vanilla / "model.safetensors")
    trained = FragmentReader(CheckpointStore(folder / "checkpoints").at_step(14).path)
    for ours, theirs in {
        "block_decoder.layers.0.feed_forward.expand.weight": "gpt_neox.layers.0.mlp.dense_h_to_4h.weight",
        "token_decoder.layers.1.attention.query_key_value.weight": "gpt_neox.layers.2.attention.query_key_value.weight",
        "token_decoder.output.head.weight": "embed_out.weight",
    }.items():
        torch.testing.assert_close(trained.read_full(ours, "weight"), source[theirs], rtol=0, atol=1e-6)
    again = uptrain("--vanilla", vanilla, "--config", config)
    assert again.returncode == 0
    assert "is complete at step 14; nothing to do" in again.stdout
    other = uptrain("--vanilla", vanilla, "--config", config, "--layers", "random")
    assert_one_clear_error(other, "initial_weights was made in another way: layers is 'partition' there and 'random'")


@pytest.mark.slow
def test_grows_blocks_in_stages_and_goes_on_after_an_interruption(tmp_path: Path, corpus: Path, vanilla: Path) -> None:
    config = target(tmp_path, corpus, optimizer={"learning_rate": 1e-9, "warmup_steps": 1})
    command = ["--vanilla", vanilla, "--config", config, "--block-lengths", "1,4"]
    process = subprocess.Popen([sys.executable, str(TOOL), *map(str, command)], start_new_session=True)
    first = tmp_path / "runs" / "target.blocks_of_1"
    deadline = time.monotonic() + 120
    while not CheckpointStore(first / "checkpoints").complete_steps() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=120) == 143
    result = uptrain(*command)
    assert result.returncode == 0, result.stderr
    assert "run target: complete at step 7" in result.stdout
    reader = FragmentReader(CheckpointStore(tmp_path / "runs" / "target" / "checkpoints").at_step(7).path)
    embedded = load_file(vanilla / "model.safetensors")["gpt_neox.embed_in.weight"]
    # A block of one token has no table in its token decoder: the longer block takes the embedder's.
    table = reader.read_full("token_decoder.input.embedding.weight", "weight")
    torch.testing.assert_close(table, embedded, rtol=0, atol=1e-6)
    projection = reader.read_full("embedder.projection.weight", "weight")
    torch.testing.assert_close(projection, torch.eye(WIDTH).repeat(1, 4) / 4, rtol=0, atol=1e-6)


def test_a_dry_run_says_where_each_weight_comes_from(
    tmp_path: Path,
    corpus: Path,
    vanilla: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--vanilla", vanilla, "--config", target(tmp_path, corpus), "--layers", "random", "--fraction", "0.5"]
    monkeypatch.setattr(sys, "argv", ["uptrain_from_vanilla.py", *map(str, arguments), "--dry-run"])
    assert main() == 0
    printed = capsys.readouterr().out
    assert "steps: 70" in printed
    assert "embedder.projection.weight <- mean over the block" in printed
    assert not (tmp_path / "runs").exists()


def test_without_arguments_it_says_what_is_missing() -> None:
    assert_one_clear_error(uptrain(), "--vanilla DIR --config CONFIG", "block_uptrain_b4_85_10.yaml")


def test_mistakes_are_explained_before_anything_is_made(
    tmp_path: Path, corpus: Path, vanilla: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = target(tmp_path, corpus)
    stack = {"num_layers": 1, "hidden_size": WIDTH, "num_attention_heads": 2}
    (tmp_path / "heads").mkdir()
    heads = target(
        tmp_path / "heads", corpus, model={"embedder": {"kind": "lookup_projection"}, "block_decoder": stack}
    )
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text((vanilla / "config.json").read_text())
    torch.save({}, pickled / "pytorch_model.bin")
    short = tmp_path / "short"
    short.mkdir()
    (short / "config.json").write_text((vanilla / "config.json").read_text())
    tensors = load_file(vanilla / "model.safetensors")
    tensors.pop("gpt_neox.layers.1.attention.dense.bias")
    save_file(tensors, short / "model.safetensors")
    for arguments, parts in [
        ((vanilla, heads), ("block_decoder.num_attention_heads is 4 there and 2 here",)),
        ((tmp_path / "absent", config), ("absent", "not a folder")),
        ((pickled, config), ("pytorch_model.bin", "safetensors")),
        ((short, config), ("gpt_neox.layers.1.attention.dense.bias",)),
        ((vanilla, config, "--fraction", "0"), ("--fraction 0",)),
        ((vanilla, config, "--fraction", "0.01"), ("optimizer.warmup_steps=3", "train.steps=1", "--fraction")),
        ((vanilla, config, "--block-lengths", "1,2"), ("--block-lengths 1,2", "model.block_length=4")),
        ((vanilla, config, "--fraction", "0.001"), ("train.steps=0 is not allowed", "--fraction")),
        ((vanilla, config, "--block-lengths", "2,3,4"), ("from 2 to 3", "each divides the next")),
        ((vanilla, config, "--block-lengths", "x"), ("--block-lengths x",)),
        ((vanilla, config, "--layers", "duplicate"), ("layer assignment duplicate", "3")),
    ]:
        command = ["uptrain_from_vanilla.py", "--vanilla", *map(str, (arguments[0], "--config", *arguments[1:]))]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises((ConfigurationError, CheckpointError)) as error:
            main()
        for part in parts:
            assert part in str(error.value)
    assert not (tmp_path / "runs").exists()
