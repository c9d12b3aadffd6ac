import shutil
from pathlib import Path

import pytest

from checkpoints.errors import CheckpointError
from checkpoints.trained_model import find_trained_model
from data.config import DataConfig
from data.errors import DataError
from inference.errors import InferenceError
from inference.generator import Generator
from inference.tokenizer_choice import tokenizer_of
from tests.data.builders import numbered_documents, write_split
from tests.inference.models import PAD_ID, random_prompt, small_config, small_stage
from tests.inference.saved_model import save_model
from tests.train.small_run import VOCABULARY, prepare_small_corpus

DATA = {"path": "gone"}


@pytest.mark.parametrize("architecture", ["block", "vanilla"])
def test_a_sharded_checkpoint_generates_what_the_model_does(tmp_path: Path, architecture: str) -> None:
    stage = small_stage(small_config(architecture))  # type: ignore[arg-type]
    step = save_model(tmp_path / "run" / "checkpoints", 9, stage, DATA)
    expected = Generator(stage, PAD_ID).generate([random_prompt(6)], 12)
    for path in (tmp_path / "run", tmp_path / "run" / "checkpoints", step):
        trained = find_trained_model(path)
        assert (trained.path, trained.step, trained.model) == (step, 9, stage.model_config)
        assert Generator(trained.load(), PAD_ID).generate([random_prompt(6)], 12) == expected


def test_the_newest_intact_step_is_taken(tmp_path: Path) -> None:
    stage = small_stage(small_config())
    older, newer = (save_model(tmp_path, step, stage, DATA) for step in (3, 12))
    assert find_trained_model(tmp_path).step == 12
    weights = newer / "rank_00002.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    found = find_trained_model(tmp_path)
    assert found.path == older
    assert found.skipped[0][0] == 12
    with pytest.raises(CheckpointError, match=r"rank_00002.safetensors is damaged"):
        find_trained_model(newer)


def test_wrong_paths_are_explained(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="missing is not a folder; give a run's folder"):
        find_trained_model(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="holds no checkpoint; give a run's folder"):
        find_trained_model(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="checkpoints holds no checkpoint"):
        find_trained_model(tmp_path)
    write_split(tmp_path / "shards", numbered_documents([3]))
    with pytest.raises(CheckpointError, match=r"manifest\.json is unreadable"):
        find_trained_model(tmp_path / "shards" / "train")


def test_a_checkpoint_of_something_else_is_explained(tmp_path: Path) -> None:
    step = save_model(tmp_path, 1, small_stage(small_config()), {"path": "shards", "unknown": 1})
    with pytest.raises(CheckpointError, match=r"config.data.unknown: extra inputs.*use a checkpoint written by"):
        find_trained_model(step)


def test_the_tokenizer_is_the_one_of_the_data(tmp_path: Path) -> None:
    model = small_config().model_copy(update={"vocab_size": VOCABULARY})
    data = DataConfig(path=prepare_small_corpus(tmp_path))
    tokenizer = tokenizer_of(model, data)
    assert tokenizer.path.parent == Path(data.path)
    assert tokenizer.decode(tokenizer.encode("It was a night")) == "It was a night"
    other = Path(shutil.copy(tokenizer.path, tmp_path / "other.model"))
    assert tokenizer_of(model, data, other).path == other
    assert tokenizer_of(model, data.model_copy(update={"tokenizer": other})).path == other
    with pytest.raises(InferenceError, match=rf"has {VOCABULARY} tokens, the model knows 48; .*--tokenizer FILE"):
        tokenizer_of(small_config(), data)
    with pytest.raises(InferenceError, match=r"data.path .*gone does not exist.*--tokenizer FILE"):
        tokenizer_of(model, data.model_copy(update={"path": tmp_path / "gone"}))
    with pytest.raises(DataError, match=r"none\.model does not exist"):
        tokenizer_of(model, data, tmp_path / "none.model")
    tokenizer.path.write_bytes(other.read_bytes() + b"\n\0")
    with pytest.raises(InferenceError, match=r"has fingerprint [0-9a-f]+, but the shards"):
        tokenizer_of(model, data)
