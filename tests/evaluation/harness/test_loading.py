"""Tasks by name and their files: what is accepted, and what a user is told otherwise."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from lm_eval.tasks import TaskManager

from data.errors import DataError
from evaluation.harness.loading import load_tasks
from evaluation.harness.local_tasks import local_task, local_task_names
from parallel.errors import ConfigurationError
from tests.evaluation.harness.local_files import write_lines

NAMES = ["arc_easy", "hellaswag", "lambada_openai", "piqa", "sciq", "wikitext", "winogrande"]


def documents(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def prompts(name: str, folder: Path) -> list[tuple[tuple[str, str], object]]:
    """Everything that is asked, and the right answers."""
    [loaded] = load_tasks([name], folder)
    [task] = loaded.tasks["tasks"].values()
    task.build_all_requests(limit=None, rank=0, world_size=1)
    return [(instance.args, task.doc_to_target(instance.doc)) for instance in task.instances]


def test_all_tasks_are_there() -> None:
    assert local_task_names() == NAMES


def test_processed_documents_ask_the_same(task_data: Path, tmp_path: Path) -> None:
    [hellaswag] = load_tasks(["hellaswag"], task_data)
    write_lines(
        tmp_path / "hellaswag_val_1000subset.jsonl",
        [
            {"ind": 1, **{field: document[field] for field in ("query", "choices", "gold")}}
            for document in hellaswag.tasks["tasks"]["hellaswag"].eval_docs
        ],
    )
    write_lines(
        tmp_path / "arc_easy_test.jsonl",
        [
            {
                "query": f"Question: {document['question']}\nAnswer:",
                "choices": document["choices"]["text"],  # type: ignore[index]
                "gold": "ABCD".index(str(document["answerKey"])),
            }
            for document in documents(task_data / "arc_easy_test.jsonl")
        ],
    )
    for name in ("hellaswag", "arc_easy"):
        raw, processed = prompts(name, task_data), prompts(name, tmp_path)
        assert [question for question, _ in raw] == [question for question, _ in processed]
        assert [int(answer) for _, answer in raw] == [int(answer) for _, answer in processed]  # type: ignore[call-overload]


def test_wikitext_is_detokenized(task_data: Path) -> None:
    assert all("@-@" not in question[0] and " ," not in question[0] for question, _ in prompts("wikitext", task_data))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"has no piqa_valid\.jsonl, which piqa reads"),
        ("", "holds no documents"),
        ("\n{\n", "line 2 is no JSON"),
        ("[1]\n", "line 1 is no JSON object"),
        ('{"goal": "x", "sol1": "y"}\n', "line 1 has the fields goal, sol1, and needs goal, sol1, sol2, label"),
        (b"\xff\xfe", "cannot be read as UTF-8"),
    ],
)
def test_wrong_files_are_explained(content: str | bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "piqa_valid.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        load_tasks(["piqa"], tmp_path)


def test_a_later_document_of_another_form_is_found(task_data: Path, tmp_path: Path) -> None:
    shutil.copy(task_data / "sciq_validation.jsonl", tmp_path / "sciq_test.jsonl")
    with open(tmp_path / "sciq_test.jsonl", "a") as file:
        file.write('{"question": "Why?"}\n')
    with pytest.raises(DataError, match=r"sciq_test\.jsonl line 9 has the fields question, and needs support"):
        load_tasks(["sciq"], tmp_path)


def test_unknown_names_are_answered_with_near_ones(task_data: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"--tasks lambda_openai is unknown; near it are lambada_openai.*--task"
    ):
        load_tasks(["piqa", "lambda_openai"], task_data)
    with pytest.raises(ConfigurationError, match="near it are validation"):
        load_tasks(["validaton"], task_data, ["validation"])
    with pytest.raises(ConfigurationError, match=rf"xyzzy is unknown; near it are {', '.join(NAMES)}"):
        load_tasks(["xyzzy"], task_data)
    with pytest.raises(ConfigurationError, match="is not a folder"):
        load_tasks(["piqa"], task_data / "missing")


def test_names_of_lm_eval(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without local files its whole list counts; here one of two tasks, whose data cannot be fetched."""
    for name in ("one", "other"):
        (tmp_path / f"{name}.yaml").write_text(f"task: my_{name}\ndataset_path: {tmp_path}/missing\n")
    build = TaskManager.__init__
    only_mine = {"include_path": str(tmp_path), "include_defaults": False}
    monkeypatch.setattr(TaskManager, "__init__", lambda self: build(self, **only_mine))
    with pytest.raises(ConfigurationError, match="my_onne is unknown; near it are my_one, my_other"):
        load_tasks(["my_onne"], None)
    (tmp_path / "data.jsonl").write_text('{"q": "2 + 2 =", "a": "4"}\n')
    code = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}}}
    code |= {"task": "my_code", "test_split": "test", "doc_to_text": "{{q}}", "doc_to_target": "{{a}}"}
    (tmp_path / "code.yaml").write_text(json.dumps(code | {"unsafe_code": True}))
    with pytest.raises(ConfigurationError, match="task my_code runs code"):
        load_tasks(["my_code"], None)
    with pytest.raises(DataError, match=r"task my_one cannot be loaded \(.*give local files with --task-data"):
        load_tasks(["my_one"], None)


def test_without_lm_eval_the_fix_is_told(monkeypatch: pytest.MonkeyPatch, task_data: Path) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    with pytest.raises(ConfigurationError, match=r'pip install -e "\.\[evaluation\]"'):
        load_tasks(["piqa"], task_data)


def test_every_task_keeps_what_lm_eval_says_of_it() -> None:
    for name in NAMES:
        assert set().union(*(layout.config for layout in local_task(name).layouts)) <= {
            "process_docs",
            "doc_to_text",
            "doc_to_choice",
            "doc_to_target",
        }
