"""Results on the disk: none is lost, torn, or mixed up with another model's."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from evaluation.report import Report
from evaluation.result import EvaluationResult
from parallel.errors import ConfigurationError


@dataclass(frozen=True)
class Number(EvaluationResult):
    """One number, and a plot of it if there is a text for that."""

    name: str
    value: float
    plot: str = ""

    def lines(self) -> list[str]:
        return [str(self.value)]

    def scalars(self) -> dict[str, float]:
        return {"value": self.value}

    def to_json(self) -> dict[str, object]:
        return {"value": self.value, "values": (self.value, [self.value])}

    def draw(self, folder: Path) -> list[Path]:
        path = folder / f"{self.name}.txt"
        if self.plot:
            path.write_text(self.plot)
        return [path] if self.plot else []


def report(folder: Path, step: int = 7) -> Report:
    return Report(folder / "results", folder / "events", "run", step)


def stored(folder: Path) -> dict[str, dict[str, object]]:
    content = json.loads((folder / "results" / "results.json").read_text())
    assert (content["run"], content["step"]) == ("run", 7)
    results: dict[str, dict[str, object]] = content["results"]
    return results


def test_results_of_one_model_come_together(tmp_path: Path) -> None:
    assert report(tmp_path).add(Number("one", 1.0)) == []
    assert not (tmp_path / "results" / "plots").exists()
    second = report(tmp_path)
    assert second.add(Number("two", 2.0, plot="two")) == [tmp_path / "results" / "plots" / "two.txt"]
    second.add(Number("one", 3.0))
    assert stored(tmp_path)["one"] == {"value": 3.0, "values": [3.0, [3.0]]}
    assert stored(tmp_path).keys() == {"one", "two"}
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["evaluation/one/value", "evaluation/two/value"]
    assert [(event.step, event.value) for event in events.Scalars("evaluation/two/value")] == [(7, 2.0)]
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == [".lock", "plots", "results.json"]


def test_json_has_no_infinity(tmp_path: Path) -> None:
    report(tmp_path).add(Number("one", math.inf))
    assert stored(tmp_path)["one"] == {"value": None, "values": [None, [None]]}


def add_many(folder: Path, first: int) -> None:
    for number in range(first, first + 10):
        report(folder).add(Number(f"n{number}", float(number)))


def test_several_writers_lose_nothing(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as writers:  # each opens the lock anew, as a process would
        list(writers.map(add_many, (tmp_path, tmp_path), (0, 10)))
    assert {name: result["value"] for name, result in stored(tmp_path).items()} == {f"n{n}": n for n in range(20)}


def test_other_models_and_files_are_not_overwritten(tmp_path: Path) -> None:
    report(tmp_path).add(Number("one", 1.0))
    with pytest.raises(ConfigurationError, match="holds the results of step 7 of run; name another folder"):
        report(tmp_path, step=8)
    for content in ("{", "[]", '{"run": "run", "step": 7}'):
        (tmp_path / "results" / "results.json").write_text(content)
        with pytest.raises(ConfigurationError, match="holds no results of this tool"):
            report(tmp_path)
        assert (tmp_path / "results" / "results.json").read_text() == content
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=r"cannot be written to .*; name another folder with --output"):
        Report(tmp_path / "file" / "results", tmp_path / "events", "run", 7)
