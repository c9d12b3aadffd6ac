"""Tasks during training: results as those of tools/evaluate_model.py, interruptions, and what users get wrong."""

import importlib.util
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.tasks import TaskManager
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data.errors import DataError
from parallel.config import ParallelConfig
from parallel.errors import ConfigurationError
from parallel.topology import initialize_topology
from slurm.launch import is_complete
from slurm.task_evaluation import prepare_tasks
from tests.evaluation.harness.local_files import write_lines, write_local_files
from tests.processes import run_processes
from tests.tools.outcomes import Script
from tests.train.small_run import prepare_small_corpus, small_run
from train.config import RunConfig
from train.config_file import config_text
from train.evaluator import Metrics, Run
from train.rank_zero import on_every_rank
from train.requests import Requests
from train.run_directory import RunDirectory
from train.stop_signals import StopSignals
from train.trainer import Trainer

TOOLS = Path(__file__).resolve().parents[2] / "tools"
TASKS = ["piqa", "lambada_openai", "wikitext"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_small_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def task_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_local_files(tmp_path_factory.mktemp("task_data"))


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[str], Script]]:
    before = signal.getsignal(signal.SIGTERM)
    yield lambda name: Script(TOOLS / name, monkeypatch, capsys)
    signal.signal(signal.SIGTERM, before)


class Interrupted:
    """An evaluator that is sent a signal on one rank, at the second call of the model after the last step."""

    def __init__(self, inner: Any, rank: int) -> None:
        self.inner, self.rank, self.evaluations = inner, rank, 0

    def evaluate(self, run: Run) -> Metrics:
        self.evaluations += 1
        calls = 0

        def counted(batches: Any) -> Any:
            nonlocal calls
            calls += 1
            if (self.evaluations, calls, self.rank) == (3, 2, 1):
                os.kill(os.getpid(), signal.SIGUSR2)
            return run(batches)

        metrics: Metrics = self.inner.evaluate(counted)
        return metrics


def train(config: RunConfig, interrupted: bool) -> tuple[str, int, bool]:
    """How a run ends, and whether there is nothing left to do."""
    place = initialize_topology(config.parallel)
    evaluator: Any = on_every_rank(lambda: prepare_tasks(config))
    if interrupted:
        evaluator = Interrupted(evaluator, place.rank)
    signals = StopSignals()
    requests = Requests(config.directory, signals, None, 0.0, watches_files=place.rank == 0)
    trainer = Trainer(config, place, requests, evaluator=evaluator)
    outcome = trainer.run()
    trainer.engine.engine.destroy()
    signals.restore()
    torch.distributed.barrier()
    return outcome.ending.name, outcome.step, is_complete(config, RunDirectory(config))


def train_all(whole: RunConfig, cut: RunConfig) -> list[tuple[str, int, bool]]:
    """One run undisturbed; and one that is stopped in its last evaluation, and then goes on under another layout."""
    pipelined = cut.model_copy(update={"parallel": ParallelConfig(pipeline=2)})
    return [train(whole, False), train(cut, True), train(pipelined, False)]


def scalars(config: RunConfig) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(config.directory / "tensorboard"))
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("evaluation/")]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


@pytest.mark.slow
def test_results_are_those_of_the_tool_whatever_interrupts(
    tmp_path: Path, shards: Path, task_data: Path, script: Callable[[str], Script]
) -> None:
    sections: dict[str, Any] = {
        "tasks": {"names": TASKS, "every": 2, "limit": 4, "data": str(task_data)},
        "train": {"steps": 5},
        "validation": {"every": 0},
        "checkpoint": {"every": 100},
    }
    whole = small_run(tmp_path, shards, "whole", **sections)
    cut = small_run(tmp_path, shards, "cut", **sections)
    endings = [("COMPLETE", 5, True), ("STOPPED", 5, False), ("COMPLETE", 5, True)]
    assert run_processes(2, train_all, whole, cut) == [endings] * 2
    recorded = scalars(whole)
    assert all([step for step, _ in points] == [2, 4, 5] for points in recorded.values())
    made_up = scalars(cut)
    assert made_up.keys() == recorded.keys()
    for tag, points in recorded.items():
        assert [step for step, _ in made_up[tag]] == [2, 4, 5]
        assert [value for _, value in made_up[tag]] == pytest.approx([value for _, value in points], rel=1e-3)

    options = ["--tasks", *TASKS, "--limit", 4, "--task-data", task_data, "--output", tmp_path / "out"]
    assert script("evaluate_model.py")("--checkpoint", whole.directory, *options).status == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    of_tool = {f"evaluation/{task}/{name}": value for task in TASKS for name, value in results[task]["metrics"].items()}
    assert {tag: points[-1][1] for tag, points in recorded.items()} == pytest.approx(of_tool, rel=1e-4)


def changed(config: RunConfig, **settings: Any) -> RunConfig:
    return config.model_copy(update={"tasks": config.tasks.model_copy(update=settings)})


def test_mistakes_are_found_before_training(
    tmp_path: Path, shards: Path, task_data: Path, script: Callable[[str], Script], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = small_run(tmp_path, shards, tasks={"names": ["piqa", "sciq", "piqa"], "data": task_data})
    evaluation = prepare_tasks(good)
    assert evaluation is not None
    assert [task.name for task in evaluation.tasks] == ["piqa", "sciq"]
    assert prepare_tasks(changed(good, names=())) is None
    empty = tmp_path / "empty"
    empty.mkdir()
    narrow = good.model_copy(update={"model": good.model.model_copy(update={"vocab_size": 100})})
    vanilla = good.model_copy(update={"model": good.model.model_copy(update={"architecture": "vanilla"})})
    for config, kind, message in [
        (changed(good, names=("piqqa",)), ConfigurationError, r"tasks\.names piqqa is unknown; near it are piqa"),
        (changed(good, data=tmp_path / "none"), ConfigurationError, r"tasks\.data .*none is not a folder"),
        (changed(good, data=empty), DataError, r"tasks\.data .* has no piqa_valid\.jsonl, which piqa reads"),
        (narrow, ConfigurationError, r"has 384 tokens, more than model\.vocab_size=100; set that to at least 384"),
        (changed(vanilla, padding="left"), ConfigurationError, r"tasks\.padding left is for block models"),
    ]:
        with pytest.raises(kind, match=message):
            prepare_tasks(config)
    path = tmp_path / "run.yaml"
    path.write_text(config_text(good))
    for options in (["--dry-run"], []):
        outcome = script("pretrain.py")(path, "tasks.names=[piqqa]", *options)
        assert (outcome.status, outcome.output) == (2, "")
        [error] = outcome.errors
        assert error.startswith("error: tasks.names piqqa is unknown; near it are piqa; other tasks of lm-eval need")
    outcome = script("pretrain.py")(path, "tasks.names=piqa")
    assert outcome.errors == [f"error: config {path}: tasks.names: 'piqa' is no list; write [piqa]"]
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    with pytest.raises(ConfigurationError, match=r'pip install -e "\.\[evaluation\]"'):
        prepare_tasks(good)


def test_tasks_that_generate_are_refused(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(tmp_path / "data.jsonl", [{"q": "2 + 2 =", "a": "4"}])
    task = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}}}
    task |= {"task": "sums", "test_split": "test", "doc_to_text": "{{q}}", "doc_to_target": "{{a}}"}
    (tmp_path / "sums.yaml").write_text(json.dumps(task | {"output_type": "generate_until"}))
    build = TaskManager.__init__
    only_mine = {"include_path": str(tmp_path), "include_defaults": False}
    monkeypatch.setattr(TaskManager, "__init__", lambda self: build(self, **only_mine))
    with pytest.raises(ConfigurationError, match=r"tasks\.names: sums generates text, which is not offered here"):
        prepare_tasks(small_run(tmp_path, shards, tasks={"names": ["sums"]}))


def fails_on_one_rank() -> str:
    place = initialize_topology(ParallelConfig(data=2))

    def prepare() -> None:
        if place.rank == 1:
            raise DataError("this node has no such file")

    with pytest.raises(DataError) as raised:
        on_every_rank(prepare)
    return str(raised.value)


def test_a_mistake_of_one_node_ends_all() -> None:
    assert run_processes(2, fails_on_one_rank) == ["this node has no such file"] * 2
