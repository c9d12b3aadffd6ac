"""A checkpoint of any layout goes on under any other: weights, moments, samples, and so the same losses."""

import io
import shutil
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from parallel.config import ParallelConfig
from parallel.topology import initialize_topology
from tests.processes import run_processes
from tests.train.small_run import prepare_small_corpus, small_run
from train.config import RunConfig
from train.metrics import MeanLoss
from train.requests import Requests
from train.stop_signals import StopSignals
from train.trainer import Trainer

# Tensor-, pipeline- and data-parallel size, ZeRO stage.
LAYOUTS = [(1, 1, 1, 0), (2, 1, 2, 1), (1, 2, 2, 1), (2, 2, 1, 0), (1, 1, 2, 2), (1, 1, 2, 3)]
SAVED, LAST = 3, 8
Layout = tuple[int, int, int, int]
Losses = list[float]


class RecordingTrainer(Trainer):
    """Keeps the loss of every step."""

    losses: Losses

    def _report(self, loss: MeanLoss, rate: float, gradient_norm: float, problem: str | None) -> None:
        self.losses.append(loss.loss)
        super()._report(loss, rate, gradient_norm, problem)


def _train(configs: list[RunConfig]) -> list[Losses]:
    """Trains runs of one layout after each other; returns their losses."""
    place = initialize_topology(configs[0].parallel)
    results = []
    for config in configs:
        requests = Requests(config.directory, StopSignals(), None, 0.0, watches_files=place.rank == 0)
        trainer = RecordingTrainer(config, place, requests)
        trainer.losses = []
        trainer.run()
        results.append(trainer.losses)
    return results


def elastic_run(root: Path, shards: Path, name: str, layout: Layout) -> RunConfig:
    tensor, pipeline, data, zero = layout
    parallel = {"tensor": tensor, "pipeline": pipeline, "data": data, "zero_stage": zero}
    checkpoint = {"every": SAVED, "keep_last": 9}
    return small_run(root, shards, name, parallel=parallel, train={"stop_step": LAST}, checkpoint=checkpoint)


class Saved:
    """For each layout the run that saved under it, and the losses of its next five steps."""

    def __init__(self, root: Path) -> None:
        self.shards = prepare_small_corpus(root)
        self.root = root
        self._losses: dict[Layout, Losses] = {}

    def losses(self, layout: Layout) -> Losses:
        if layout not in self._losses:
            config = elastic_run(self.root, self.shards, self._name(layout), layout)
            self._losses[layout] = run_processes(config.parallel.world_size, _train, [config])[0][0][SAVED:]
        return self._losses[layout]

    def checkpoint(self, layout: Layout) -> Path:
        return self.root / self._name(layout) / "checkpoints" / f"step_{SAVED:08d}"

    def _name(self, layout: Layout) -> str:
        return "saved-" + "-".join(map(str, layout))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(tmp_path_factory.mktemp("elastic"))


def check(saved: Saved, root: Path, target: Layout, sources: list[Layout]) -> None:
    """Goes on under the target layout from what each of the others saved."""
    expected = [saved.losses(source) for source in sources]
    configs = []
    for number, source in enumerate(sources):
        configs.append(elastic_run(root, saved.shards, f"from-{number}", target))
        shutil.copytree(saved.checkpoint(source), configs[-1].directory / "checkpoints" / f"step_{SAVED:08d}")
    for rank in run_processes(configs[0].parallel.world_size, _train, configs):
        for losses, wanted in zip(rank, expected, strict=True):
            assert len(losses) == LAST - SAVED
            assert losses == pytest.approx(wanted, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(LAYOUTS)))
def test_goes_on_under_the_next_layout(saved: Saved, tmp_path: Path, number: int) -> None:
    check(saved, tmp_path, LAYOUTS[(number + 1) % len(LAYOUTS)], [LAYOUTS[number]])


@pytest.mark.whole
@pytest.mark.parametrize("target", LAYOUTS)
def test_goes_on_under_every_layout(saved: Saved, tmp_path: Path, target: Layout) -> None:
    check(saved, tmp_path, target, LAYOUTS)


def _train_listening(config: RunConfig) -> str:
    with redirect_stdout(io.StringIO()) as said:
        _train([config])
    return said.getvalue()


def test_says_that_the_layout_has_changed(saved: Saved, tmp_path: Path) -> None:
    saved.losses((2, 1, 2, 1))
    config = elastic_run(tmp_path, saved.shards, "moved", (1, 1, 1, 0))
    shutil.copytree(saved.checkpoint((2, 1, 2, 1)), config.directory / "checkpoints" / f"step_{SAVED:08d}")
    then, now = ParallelConfig(tensor=2, data=2, zero_stage=1), ParallelConfig(zero_stage=0)
    (said,) = run_processes(1, _train_listening, config)
    assert f"it was written under {then} and goes on under {now}" in said
