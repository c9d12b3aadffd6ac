"""Block models: what lm-eval gets equals what a slow scorer gives it, in both paddings, also over rolling windows."""

from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.api.instance import Instance

from data.tokenizer import Tokenizer, load_tokenizer
from evaluation.harness.adapter import HarnessModel
from evaluation.harness.loading import load_tasks, quiet
from evaluation.harness.running import run_task
from evaluation.padding import Padding
from evaluation.stage_scorer import StageScorer
from evaluation.text_generation import TextGenerator
from inference.errors import InferenceError
from inference.generator import Generator
from parallel.config import ParallelConfig
from parallel.errors import ConfigurationError
from parallel.stage import Stage, build_stage
from tests.evaluation.slow_scorer import slow_score
from tests.evaluation.text import small_model

CASES = [("prefix", 4), ("prefix", 1), ("summation", 4), ("cross_attention", 4), ("cross_attention", 1)]


class SlowModel(HarnessModel):
    """The same tokens, each text alone."""

    def __init__(self, stage: Stage, tokenizer: Tokenizer, padding: Padding) -> None:
        super().__init__(StageScorer(stage, tokenizer.eos_id, padding), tokenizer)
        self._stage, self._padding = stage, padding

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        return [self._alone(context, continuation)[:2] for _, context, continuation in requests]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        return [self._rolling(request.args[0]) for request in requests]

    def _rolling(self, text: str) -> float:
        """Every token once, behind as much as fits."""
        tokens = [self.eot_token_id, *self.tok_encode(text)]
        room = self._stage.model_config.sequence_length
        if self._padding == "left":
            room -= self._stage.model_config.block_length - 1
        total = 0.0
        for start in range(1, len(tokens), room - 1):
            stop = min(start + room - 1, len(tokens))
            total += self._alone(tokens[max(0, stop - room) : start], tokens[start:stop])[0]
        return total

    def _alone(self, context: list[int], continuation: list[int]) -> tuple[float, bool, int]:
        return slow_score(self._stage, context, continuation, self.eot_token_id, self._padding)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_file: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_file)


def random_stage(kind: str, length: int) -> Stage:
    config = small_model(kind, length, sequence_length=48).model_copy(update={"vocab_size": 512})
    return build_stage(config, ParallelConfig(), seed=1).eval()


def metrics(model: HarnessModel, name: str, task_data: Path) -> dict[str, float]:
    [task] = load_tasks([name], task_data)
    with quiet():
        results = lm_eval.evaluate(model, task.tasks, bootstrap_iters=0)["results"][name]
    return {key: value for key, value in results.items() if isinstance(value, float) and "," in key}


@pytest.mark.parametrize("padding", ["left", "none"])
@pytest.mark.parametrize(("kind", "length"), CASES)
def test_tasks_equal_a_slow_scorer(
    kind: str, length: int, padding: Padding, tokenizer: Tokenizer, task_data: Path
) -> None:
    stage = random_stage(kind, length)
    ours = HarnessModel(StageScorer(stage, tokenizer.eos_id, padding, 500), tokenizer)
    slow = SlowModel(stage, tokenizer, padding)
    for name in ("lambada_openai", "wikitext", "arc_easy"):
        expected = metrics(slow, name, task_data)
        assert len(expected) >= 2
        assert metrics(ours, name, task_data) == pytest.approx(expected, rel=1e-5, abs=1e-4)


def test_continuations_within_the_first_block_are_counted(tokenizer: Tokenizer, task_data: Path) -> None:
    stage = random_stage("prefix", 4)
    requests = [Instance("loglikelihood", {}, ("", text), 0) for text in ("a", "ab", "It was a dark night")]
    model = HarnessModel(StageScorer(stage, tokenizer.eos_id, "none"), tokenizer)
    answers = model.loglikelihood(requests)
    assert answers[:2] == [(0.0, False)] * 2
    assert answers[2][0] < 0
    assert model.unscored_continuations == 2
    [task] = load_tasks(["lambada_openai"], task_data)
    result = run_task(model, task, None, "none")
    assert result.unscored_continuations == 0, "those of this task"
    assert result.padding == "none"
    assert not any("first block" in line for line in result.lines())
    padded = HarnessModel(StageScorer(stage, tokenizer.eos_id, "left"), tokenizer)
    assert all(value < 0 for value, _ in padded.loglikelihood(requests))
    assert padded.unscored_continuations == 0


def test_generation_has_limits(tokenizer: Tokenizer) -> None:
    stage = random_stage("prefix", 4)
    scorer = StageScorer(stage, tokenizer.eos_id, "left")
    generator = TextGenerator(Generator(stage, tokenizer.eos_id, tokenizer.vocab_size), tokenizer, 256)

    def generate(model: HarnessModel, context: str, **arguments: Any) -> str:
        return model.generate_until([Instance("generate_until", {}, (context, arguments), 0)])[0]

    model = HarnessModel(scorer, tokenizer, lambda: generator)
    drawn = {"do_sample": True, "temperature": 2.0, "max_gen_toks": 12}
    assert generate(model, "It was a", **drawn) == generate(model, "It was a", **drawn, top_k=512)
    assert generate(model, "It was a", **drawn) != generate(model, "It was a", max_gen_toks=12)
    assert generate(model, "", max_gen_toks=12, num_beams=1)
    assert generate(model, "word " * 500, max_gen_toks=12), "its end is continued"
    with pytest.raises(ConfigurationError, match=r"num_beams.*not offered"):
        generate(model, "It was a", num_beams=4, max_gen_toks=12)
    with pytest.raises(ConfigurationError, match="generates 256 tokens, and the model reads 44"):
        generate(model, "It was a")
    with pytest.raises(InferenceError, match="temperature"):
        generate(model, "It was a", do_sample=True, temperature=-1.0, max_gen_toks=12)
    with pytest.raises(ConfigurationError, match="generates none"):
        generate(HarnessModel(scorer, tokenizer), "It was a")
