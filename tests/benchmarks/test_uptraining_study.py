"""The uptraining study without its training: its plan, how it goes on, its statistics and tables on made-up results."""

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.uptraining.execution import StudyError, run_all
from benchmarks.uptraining.plan import CONFIGS, METHODS, Study, StudyRun
from benchmarks.uptraining.statistics import (
    MethodResult,
    gain,
    in_deviations,
    position_table,
    read_results,
    results_as_json,
    table,
)
from train.config import RunConfig
from train.config_file import load_config

LOSSES = {
    "vanilla": (3.0, 3.2, 3.1),
    "scratch_short": (4.0, 4.2, 4.1),
    "partition": (3.5, 3.6, 3.7),
    "random": (3.8, 4.0, 4.2),
    "average": (3.75,),
}


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(output=tmp_path, seeds=3, extra_seeds=1, steps=2500, block_length=4)


def write_result(run: StudyRun, loss: float, positions: Sequence[float]) -> None:
    run.result.parent.mkdir(exist_ok=True)
    value = {"step": 250, "loss": loss, "loss_by_position": positions, "targets": 1000}
    run.result.write_text(json.dumps(value))


@pytest.fixture
def results(study: Study) -> dict[str, MethodResult]:
    for run in study.runs:
        losses = LOSSES.get(run.method.name, ())
        if run.seed < len(losses):
            loss = losses[run.seed] + (run.draw - 1) * 0.01 * (run.method.draws > 1)
            write_result(run, loss, [loss] if run.method.name == "vanilla" else [loss + 0.5, loss, loss, loss + 0.1])
    return read_results(study.runs)


def configured(run: StudyRun) -> RunConfig:
    """What the training command of a run asks for."""
    path = next(Path(word) for word in run.training if word.endswith(".yaml"))
    overrides = [word for word in run.training if "=" in word]
    return load_config(path, overrides)


def test_every_seed_has_each_method_and_the_extra_ones_come_last(study: Study) -> None:
    names = [run.name for run in study.runs]
    extra = sum(method.is_extra for method in METHODS)
    draws = sum(method.draws for method in METHODS if not method.is_extra)
    assert len(names) == len(set(names)) == 3 * draws + extra
    assert all(run.method.is_extra for run in study.runs[-extra:])


def test_runs_differ_only_where_the_study_compares(study: Study) -> None:
    configs = {run.name: configured(run) for run in study.runs}
    for run in study.runs:
        config = configs[run.name]
        assert (config.run.seed, config.data.seed) == (run.seed + 100 * run.draw, run.seed)
        is_short_from_scratch = run.method.uptraining is None and run.method.fraction < 1
        assert config.train.steps == (250 if is_short_from_scratch else 2500)
        assert config.optimizer.warmup_steps < 250 // 3, "also each of three stages is longer than its warm-up"
        assert config.optimizer == configs["vanilla-seed0"].optimizer
    block, double = configs["partition-seed0"].model, configs["duplicate-seed0"].model
    layers = configs["vanilla-seed0"].model.vanilla.num_layers
    assert block.blocks.num_layers + block.tokens.num_layers == layers
    assert double.blocks.num_layers == double.tokens.num_layers == layers
    assert {configs[run.name].model for run in study.runs if run.method.config == "block"} == {block}


def test_uptrained_runs_start_from_the_source_of_their_seed(study: Study) -> None:
    for run in study.runs:
        if run.method.uptraining is None:
            assert run.needs is None
            assert run.training[1].endswith("tools/pretrain.py")
        else:
            assert run.needs == f"vanilla-seed{run.seed}"
            assert run.training[1].endswith("tools/uptrain_from_vanilla.py")
            assert run.training[run.training.index("--vanilla") + 1].endswith(f"runs/vanilla-seed{run.seed}")
            assert run.training[run.training.index("--fraction") + 1] == "0.1"


def test_all_models_predict_the_same_tokens(study: Study) -> None:
    for run in study.runs:
        command = run.evaluation(Path("result.json"))
        assert command[command.index("--skip-tokens") + 1] == "4"
        data = configured(run).data
        assert not data.random_left_padding
        assert not data.pad_to_block_boundary


class FakeRun(StudyRun):
    """Its commands only write files; without `needs` of its seed's source, it fails."""

    @property
    def training(self) -> list[str]:
        fails = self.needs is not None and not (self.study.output / "results" / f"{self.needs}.json").is_file()
        return [sys.executable, "-c", f"print('training'); raise SystemExit({int(fails)})"]

    def evaluation(self, output: Path) -> list[str]:
        return [sys.executable, "-c", f"open({str(output)!r}, 'w').write('{{}}')"]


@pytest.fixture
def fake_runs(study: Study) -> list[StudyRun]:
    return [FakeRun(study, run.method, run.seed) for run in study.runs if run.method.name in LOSSES and not run.draw][
        :5
    ]


def test_runs_wait_for_their_source_and_finished_ones_are_skipped(fake_runs: list[StudyRun]) -> None:
    lines: list[str] = []
    run_all(fake_runs[::-1], 2, lines.append)
    assert all(run.result.read_text() == "{}" for run in fake_runs)
    assert lines[0] == "0 of 5 runs are finished"
    fake_runs[1].result.unlink()
    again: list[str] = []
    run_all(fake_runs, 2, again.append)
    assert again[:2] == ["4 of 5 runs are finished", f"{fake_runs[1].name} starts"]
    assert len(again) == 3


class FailingRun(FakeRun):
    """Its training fails."""

    @property
    def training(self) -> list[str]:
        return [sys.executable, "-c", "raise SystemExit(2)"]


class EndlessRun(FakeRun):
    """Its training ends only when it is told to."""

    @property
    def training(self) -> list[str]:
        return [sys.executable, "-c", "import time; time.sleep(600)"]


def test_a_failure_names_the_log_and_stops_the_others(study: Study) -> None:
    vanilla = next(method for method in METHODS if method.name == "vanilla")
    runs = [EndlessRun(study, vanilla, 0), FailingRun(study, vanilla, 1)]
    with pytest.raises(StudyError, match=r"vanilla-seed1 failed with status 2; see .*vanilla-seed1\.log"):
        run_all(runs, 2, lambda line: None)
    assert not any(run.result.exists() for run in runs)


def test_gains_are_paired_by_seed(results: dict[str, MethodResult]) -> None:
    difference = gain(results["partition"], results["random"])
    assert difference.mean == pytest.approx((0.3 + 0.4 + 0.5) / 3)
    assert difference.deviation == pytest.approx(0.1)
    assert in_deviations(difference) == pytest.approx(4.0)
    alone = gain(results["average"], results["random"])
    assert (alone.mean, alone.deviation, in_deviations(alone)) == (pytest.approx(0.05), None, None)
    assert in_deviations(gain(results["partition"], results["vanilla"])) == pytest.approx(-5.0)
    assert in_deviations(type(difference)(0.5, 0.0)) == math.inf


def test_the_table_shows_spread_and_gains(results: dict[str, MethodResult]) -> None:
    lines = table(results).splitlines()
    assert len(lines) == 2 + len(LOSSES)
    assert "| vanilla source | 2,500 | 3 | 3.100 ± 0.100 | 1.000 ± 0.000 " in lines[2]
    assert lines[3].endswith("| 4.100 ± 0.100 |  | -0.100 ± 0.173 (-0.6 sd) |")
    assert lines[4] == (
        "| uptrained, partition | 250 | 3 | 3.600 ± 0.100 | 0.500 ± 0.100 (5.0 sd) | 0.400 ± 0.100 (4.0 sd) |"
    )
    assert lines[6] == "| uptrained, average of neighbours | 250 | 1 | 3.750 | 0.250 | 0.050 |"


def test_the_position_table_has_the_block_models_only(results: dict[str, MethodResult]) -> None:
    lines = position_table(results).splitlines()
    assert len(lines) == 2 + len(LOSSES) - 1
    assert lines[3] == "| uptrained, partition | 4.100 ± 0.100 | 3.600 ± 0.100 | 3.600 ± 0.100 | 3.700 ± 0.100 |"


def test_relative_positions_leave_out_what_seeds_differ_in(results: dict[str, MethodResult]) -> None:
    spreads = results["partition"].relative_position_spreads
    assert [one.mean for one in spreads] == pytest.approx([0.35, -0.15, -0.15, -0.05])
    assert [one.deviation for one in spreads] == pytest.approx([0.0] * 4, abs=1e-9)


def test_the_numbers_are_written_by_seed(results: dict[str, MethodResult]) -> None:
    written = json.loads(results_as_json(results))
    assert written["partition"]["loss_by_seed"] == {"0": 3.5, "1": 3.6, "2": 3.7}
    assert written["random"]["losses_of_draws_by_seed"]["0"] == pytest.approx([3.79, 3.8, 3.81])
    assert written["random"]["loss_by_seed"]["0"] == pytest.approx(3.8)
    assert written["partition"]["standard_deviation"] == pytest.approx(0.1)
    assert written["average"]["standard_deviation"] is None


def test_the_script_starts_from_any_folder(tmp_path: Path) -> None:
    script = CONFIGS.parent / "uptraining_study.py"
    result = subprocess.run([sys.executable, script, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--validation-input" in result.stdout
