"""Files of sweeps: what they mean, and mistakes in them."""

from pathlib import Path

import pytest

from parallel.errors import ConfigurationError
from slurm.sweep import sweep_runs
from tests.train.small_run import small_run
from train.config_file import config_text


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(config_text(small_run(tmp_path / "runs", tmp_path / "shards")))
    return path


def test_every_point_is_a_run_of_its_own(tmp_path: Path, config: Path) -> None:
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(
        "- {run.name: slow, optimizer.learning_rate: 1.0e-4}\n"
        "- run.name: other\n  train.steps: 20\n  parallel: {data: 2, zero_stage: 0}\n"
    )
    slow, other = sweep_runs(config, ["train.steps=30", "run.seed=7"], sweep)
    assert (slow.run.name, slow.optimizer.learning_rate, slow.train.steps) == ("slow", 1e-4, 30)
    assert (other.run.name, other.optimizer.learning_rate, other.train.steps) == ("other", 1e-2, 20)
    assert (other.parallel.zero_stage, slow.run.seed, other.run.seed) == (0, 7, 7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "cannot be read as YAML"),
        ("{}", "must be a list of points"),
        ("[]", "must be a list of points"),
        ("- {train.steps: 20}", "point 1: .* is no mapping with a run.name of its own"),
        ("- {run.name: a}\n- {run.name: a, train.steps: 20}", "several points have run.name=a"),
        ("- {run.name: a}\n- {run.name: b, train.stepz: 20}", "point 2: .*unknown field train.stepz"),
        ("- {run.name: a}\n- {run.name: b, parallel.data: 1}", "the points need 1 and 2 processes"),
    ],
)
def test_mistakes(tmp_path: Path, config: Path, text: str, message: str) -> None:
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        sweep_runs(config, [], sweep)
    with pytest.raises(ConfigurationError, match="does not exist"):
        sweep_runs(config, [], tmp_path / "absent.yaml")
