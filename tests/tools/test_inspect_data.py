"""tools/inspect_data.py as a user runs it, on a small corpus."""

import shutil
from pathlib import Path

import pytest

from data.manifest import read_manifest
from tests.tools.outcomes import Outcome, Script
from tests.train.small_run import prepare_small_corpus, small_run
from train.config_file import config_text

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "inspect_data.py"


@pytest.fixture
def inspect(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Script:
    return Script(SCRIPT, monkeypatch, capsys)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_small_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def config(shards: Path, tmp_path: Path) -> Path:
    """A configuration file with another data.path."""
    path = tmp_path / "config.yaml"
    path.write_text(config_text(small_run(tmp_path, tmp_path / "elsewhere")))
    return path


def test_what_a_corpus_holds(inspect: Script, shards: Path) -> None:
    manifest = read_manifest(shards / "train")
    described = inspect("statistics", shards, "--sequence-length", 64, "--block-length", 2)
    assert (described.status, described.errors) == (0, [])
    assert f"train: 1 documents, {manifest.tokens:,} tokens of uint16 in 1 shards" in described.output
    assert "with padding to blocks of 2: " in described.output
    shown = inspect("documents", shards, "--split", "validation", "--characters", 0)
    assert (shown.status, shown.errors) == (0, [])
    heading, _, text = shown.output.partition("\n")
    assert heading.startswith("--- validation shard 0, document 0: ")
    assert text.strip() == (shards.parent / "validation.txt").read_text().strip()


def test_damage_is_status_1(inspect: Script, shards: Path, tmp_path: Path) -> None:
    assert inspect("verify", shards) == Outcome(0, "2 shards read, 0 damaged\n", [])
    same = inspect("compare", shards, shutil.copytree(shards, tmp_path / "copy"))
    assert (same.status, same.output.count("the same shards, made with the same tokenizer")) == (0, 2)
    (tmp_path / "copy" / "train" / "shard-00000.tar").write_bytes(b"")
    shutil.rmtree(tmp_path / "copy" / "validation")
    damaged = inspect("verify", tmp_path / "copy")
    assert (damaged.status, damaged.errors) == (1, [])
    assert "shard-00000.tar has 0 bytes" in damaged.output
    assert damaged.output.endswith("\n1 shards read, 1 damaged\n")
    other = inspect("compare", shards, tmp_path / "copy")
    assert (other.status, f"validation: only in {shards}" in other.output) == (1, True)


def test_overrides_stand_before_and_behind_options(inspect: Script, config: Path, shards: Path) -> None:
    found = f"data.path={shards}"
    before = inspect("step", config, "train.steps=20", found, "--step", 15)
    assert (before.status, before.errors) == (0, [])
    assert before.output.startswith("step 15 of small: sequences 56 to 59 of the stream\ndata-parallel rank 0\n")
    assert inspect("step", config, "--step", 15, "train.steps=20", found) == before
    assert inspect("step", config, "train.steps=20", "--step", 15, found) == before
    one_rank = inspect(
        "step", "--step", 15, "--rank", 1, config, found, "--tokenizer", shards / "tokenizer.model", "train.steps=20"
    )
    assert one_rank.status == 0
    assert one_rank.output.count("data-parallel rank") == 1
    assert one_rank.output.count("position") == 2
    assert len(one_rank.output.splitlines()) == 6


def test_mistakes_are_one_line_and_status_2(inspect: Script, config: Path, shards: Path, tmp_path: Path) -> None:
    mistakes = {
        "--sequence-length 0 must be from 1": inspect("statistics", shards, "--sequence-length", 0),
        "--block-length -4 must be from 1": inspect("statistics", shards, "--block-length", -4),
        "--count 0 must be at least 1": inspect("documents", shards, "--count", 0),
        "--count -3 must be at least 1": inspect("documents", shards, "--count", -3),
        "--characters -1 must be": inspect("documents", shards, "--characters", -1),
        "--shard 7: ": inspect("documents", shards, "--shard", 7),
        "holds neither train/ nor validation/": inspect("verify", tmp_path),
        "missing holds neither": inspect("compare", shards, tmp_path / "missing"),
        "elsewhere does not exist": inspect("step", config, "--step", 1),
        "[::1/x is a malformed URL": inspect("step", config, "--step", 1, "data.path=http://[::1/x"),
        "--step 15 must be from 1 to train.steps=14": inspect("step", config, "--step", 15),
        "unknown field no;": inspect("step", config, "--step", 1, "no.field=3"),
    }
    for expected, outcome in mistakes.items():
        assert (outcome.status, outcome.output) == (2, ""), (expected, outcome)
        assert len(outcome.errors) == 1, outcome.errors
        assert outcome.errors[0].startswith("error: ")
        assert expected in outcome.errors[0]


def test_words_that_are_no_overrides_are_unknown(inspect: Script, config: Path, shards: Path) -> None:
    for words in (
        ("step", config, "--step", 1, "word"),
        ("step", config, "--step", 1, "--steps=3"),
        ("verify", shards, "train.steps=3"),
    ):
        outcome = inspect(*words)
        assert (outcome.status, outcome.output) == (2, "")
        assert outcome.errors[-1] == f"inspect_data.py: error: unrecognized arguments: {words[-1]}"
