"""Our vanilla path gives what lm-eval's own `hf` model gives, task by task and request by request."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from checkpoints.trained_model import find_trained_model
from evaluation.harness.loading import load_tasks, quiet
from evaluation.harness.local_tasks import local_task_names
from evaluation.harness.running import run_task
from evaluation.suite import EvaluationOptions, EvaluationRequest, LoadedModel
from tests.checkpoints.weights.models import converted, save_transformers

CONTEXT = 96

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@dataclass(frozen=True)
class Pair:
    """The same model twice."""

    ours: LoadedModel
    theirs: HFLM


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Pair:
    folder = tmp_path_factory.mktemp("model")
    source = save_transformers(folder / "source", "GPTNeoX", vocab_size=512, max_position_embeddings=CONTEXT)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file), eos_token="<|endoftext|>")
    fast.save_pretrained(source)
    converted(source, folder / "ours", "ours", tokenizer=source / "tokenizer.json")
    trained = find_trained_model(folder / "ours")
    request = EvaluationRequest(trained, EvaluationOptions(batch_tokens=600))
    theirs = HFLM(pretrained=str(source), tokenizer=fast, device="cpu", dtype="float32", batch_size=1)
    assert theirs.max_length == CONTEXT
    return Pair(LoadedModel(request, trained.load()), theirs)


def evaluate(model: Any, name: str, task_data: Path) -> tuple[dict[str, float], list[Any]]:
    """Metrics of a task, and the answers to its requests in order."""
    [task] = load_tasks([name], task_data)
    with quiet():
        result = lm_eval.evaluate(model, task.tasks, bootstrap_iters=0)
    metrics = {key: value for key, value in result["results"][name].items() if isinstance(value, float) and "," in key}
    samples = sorted(result["samples"][name], key=lambda sample: sample["doc_id"])
    return metrics, [answer for sample in samples for answers in sample["resps"] for answer in answers]


@pytest.mark.parametrize("name", local_task_names())
def test_every_local_task(name: str, pair: Pair, task_data: Path) -> None:
    ours, our_answers = evaluate(pair.ours.harness, name, task_data)
    theirs, their_answers = evaluate(pair.theirs, name, task_data)
    assert len(our_answers) == len(their_answers) >= 5
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-4)
    if isinstance(our_answers[0], tuple):
        assert [value for value, _ in our_answers] == pytest.approx([value for value, _ in their_answers], abs=1e-4)
        assert [greedy for _, greedy in our_answers] == [greedy for _, greedy in their_answers]
    else:
        # Sums over hundreds of tokens, which the other model adds up in fp32.
        assert our_answers == pytest.approx(their_answers, rel=1e-6, abs=1e-4)
    result = run_task(pair.ours.harness, load_tasks([name], task_data)[0], 3, None)
    assert result.documents == 3
    assert {f"{metric},none" for metric in result.metrics} == ours.keys()
    assert {metric.partition(",")[0] for metric in result.standard_errors} <= {"acc", "acc_norm"}


def test_long_and_odd_texts(pair: Pair) -> None:
    """What the tasks do not have: a context that is too long, an empty one, spaces at its end, windows of all sizes."""
    long = "It was a dark night and nobody said a word. " * 12
    pairs = [(long, "Then"), ("", " Then it was day."), ("It was  ", "not"), ("ß", "→ é")]
    requests = [Instance("loglikelihood", {}, arguments, 0) for arguments in pairs]
    ours, theirs = pair.ours.harness.loglikelihood(requests), pair.theirs.loglikelihood(requests)
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=1e-4)
    texts = [long[:count] for count in (1, 30, 200, 210, 220, 230, 240, 250, 500)]
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    ours_rolling = pair.ours.harness.loglikelihood_rolling(requests)
    assert ours_rolling == pytest.approx(pair.theirs.loglikelihood_rolling(requests), rel=1e-6, abs=1e-4)


def generated(generate: Callable[[list[Instance]], list[str]], *requests: tuple[str, dict[str, Any]]) -> list[str]:
    return generate([Instance("generate_until", {}, request, 0) for request in requests])


def test_greedy_generation(pair: Pair) -> None:
    ours, theirs = pair.ours.harness.generate_until, pair.theirs.generate_until
    prompts = ["It was a", "The horse stood still and", "She said:", "word " * 150]
    free = {"until": [], "max_gen_toks": 24, "do_sample": False, "temperature": 1}
    whole = generated(ours, *((prompt, free) for prompt in prompts))
    assert whole == generated(theirs, *((prompt, free) for prompt in prompts))
    assert len(set(whole)) > 1
    # A stop string that comes in the middle of a text, and within a token.
    stops = [{"until": [text[len(text) // 2 :][:2], "never comes"], "max_gen_toks": 24} for text in whole]
    requests = list(zip(prompts, stops, strict=True))
    stopped = generated(ours, *requests)
    assert stopped == generated(theirs, *requests)
    assert all(len(short) < len(text) for short, text in zip(stopped, whole, strict=True))
    assert generated(ours, *requests, *requests[::-1]) == stopped + stopped[::-1], "the batch changes nothing"
