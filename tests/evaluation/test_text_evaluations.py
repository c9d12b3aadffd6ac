"""Evaluations of documents and haystacks by name, from a checkpoint to a report."""

import json
from pathlib import Path

import pytest

from checkpoints.trained_model import TrainedModel, find_trained_model
from data.errors import DataError
from evaluation.report import Report
from evaluation.suite import EvaluationOptions, EvaluationRequest, LoadedModel, prepare_evaluations
from parallel.errors import ConfigurationError
from tests.evaluation.text import book, small_stage, small_tokenizer
from tests.inference.saved_model import save_model

NAMES = ("positions", "needle", "attention", "context_embeddings")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, a text and a run."""
    folder = tmp_path_factory.mktemp("evaluated")
    small_tokenizer(folder)
    (folder / "book.txt").write_text(book()[60_000:64_000])
    save_model(folder / "run" / "checkpoints", 9, small_stage(), {"path": "gone"})
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> TrainedModel:
    return find_trained_model(folder / "run")


def request_of(folder: Path, trained: TrainedModel, **options: object) -> EvaluationRequest:
    paths = {"tokenizer": folder / "tokenizer.model", "documents": folder / "book.txt", "haystack": folder / "book.txt"}
    return EvaluationRequest(trained, EvaluationOptions(**{**paths, **options}))  # type: ignore[arg-type]


@pytest.mark.slow
def test_all_are_run_and_reported(folder: Path, trained: TrainedModel, tmp_path: Path) -> None:
    request = request_of(folder, trained, chunks=6, needle_lengths=[320], needle_samples=1)
    evaluations = prepare_evaluations(request, NAMES)
    model = LoadedModel(request, trained.load())
    report = Report(tmp_path / "results", tmp_path / "events", "run", 9)
    with pytest.warns(UserWarning, match="sequence_length=64"):
        plots = [path for evaluate in evaluations for path in report.add(evaluate(model))]
    results = json.loads((tmp_path / "results" / "results.json").read_text())["results"]
    assert tuple(results) == NAMES
    assert (results["positions"]["chunks"], results["attention"]["chunks"]) == (6, 6)
    assert len(results["needle"]["cells"]) == 2 * 11
    assert len({path.name for path in plots}) == len(plots) == 2 + 2 + 4 + 1


@pytest.mark.parametrize("name", NAMES)
def test_what_is_missing_is_named_before_the_model_is_loaded(folder: Path, trained: TrainedModel, name: str) -> None:
    option = "haystack" if name == "needle" else "documents"
    with pytest.raises(ConfigurationError, match=rf"{name}.* need.* --{option} PATH"):
        prepare_evaluations(request_of(folder, trained, needle_lengths=[320], **{option: None}), [name])
    with pytest.raises(DataError, match=r"absent\.txt does not exist"):
        prepare_evaluations(
            request_of(folder, trained, needle_lengths=[320], **{option: folder / "absent.txt"}), [name]
        )


def test_impossible_lengths_are_told(folder: Path, trained: TrainedModel) -> None:
    with pytest.raises(DataError, match="holds no document of 4000 tokens"):
        prepare_evaluations(request_of(folder, trained, context_length=4000), ["attention"])
    with pytest.raises(ConfigurationError, match="--context-length 10 "):
        prepare_evaluations(request_of(folder, trained, context_length=10), ["positions"])
    with pytest.raises(ConfigurationError, match="--needle-lengths 64 is too short"):
        prepare_evaluations(request_of(folder, trained), ["needle"])
