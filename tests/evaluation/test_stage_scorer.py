"""Batched scores equal those of the plainest scorer."""

import pytest
import torch

from data.config import DataConfig, SourceConfig
from evaluation.padding import Padding, TextLayout, choose_padding
from evaluation.scoring import ScoredText
from evaluation.stage_scorer import StageScorer
from parallel.config import ModelConfig, ParallelConfig
from parallel.errors import ConfigurationError
from parallel.stage import build_stage
from parallel.topology import initialize_topology
from tests.evaluation.slow_scorer import slow_score
from tests.inference.models import PAD_ID, VOCAB_SIZE, random_prompt, small_config, small_stage
from tests.processes import run_processes
from train.selftest_models import MODELS, VARIANTS

CONFIGS = {
    **{f"prefix, L={length}": small_config("block", length) for length in (1, 2, 4)},
    "vanilla": small_config("vanilla"),
    **{name: MODELS[name].model_copy(update={"vocab_size": VOCAB_SIZE, "initializer_std": 0.6}) for name in VARIANTS},
}


def texts() -> list[ScoredText]:
    """Lengths around blocks and around the longest text, with long and short continuations, and empty ones."""
    lengths = [(0, 3), (1, 1), (1, 2), (2, 5), (3, 1), (4, 4), (5, 9), (9, 2), (20, 12), (30, 3), (31, 1), (25, 40)]
    pairs = [(random_prompt(context, 1), random_prompt(continuation, 2)) for context, continuation in lengths]
    return [ScoredText(context, continuation) for context, continuation in [*pairs, ([5], []), ([], [])]]


@pytest.mark.parametrize("padding", ["left", "none"])
@pytest.mark.parametrize("name", CONFIGS)
def test_scores_equal_those_of_one_text_at_a_time(name: str, padding: Padding) -> None:
    stage = small_stage(CONFIGS[name])
    finished: list[int] = []
    scores = StageScorer(stage, PAD_ID, padding, batch_tokens=100).score(texts(), finished.append)
    assert sum(finished) == len(texts())
    for text, score in zip(texts(), scores, strict=True):
        expected = slow_score(stage, text.context, text.continuation, PAD_ID, padding)
        assert score.log_probability == pytest.approx(expected[0], abs=1e-4)
        assert (score.is_greedy, score.scored_tokens) == expected[1:]
    assert {score.scored_tokens for score in scores[-2:]} == {0}


def test_the_most_likely_continuation_is_greedy() -> None:
    scorer = StageScorer(small_stage(small_config()), PAD_ID, "left")
    context = random_prompt(7)
    single = [scorer.score([ScoredText(context, [token])])[0] for token in range(VOCAB_SIZE)]
    assert [score.is_greedy for score in single].count(True) == 1
    assert max(single, key=lambda score: score.log_probability).is_greedy
    assert sum(torch.tensor([score.log_probability for score in single]).exp()) == pytest.approx(1.0, abs=1e-5)


def test_long_texts_lose_their_beginning() -> None:
    for config, padding, room in (
        (small_config(), "left", 29),
        (small_config(), "none", 32),
        (small_config("vanilla"), None, 33),
    ):
        scorer = StageScorer(small_stage(config), PAD_ID, padding)
        assert scorer.max_length == room - 1
        text = random_prompt(60)
        long, short = scorer.score([ScoredText(text[:-2], text[-2:]), ScoredText(text[-room:-2], text[-2:])])
        assert long == short


def sharded_scores(config: ModelConfig) -> list[float]:
    initialize_topology(ParallelConfig(tensor=2))
    stage = build_stage(config, ParallelConfig(tensor=2), seed=1)
    return [score.log_probability for score in StageScorer(stage, PAD_ID, "left").score(texts())]


@pytest.mark.slow
def test_tensor_parallel_ranks_agree_with_one_process() -> None:
    alone = StageScorer(small_stage(small_config()), PAD_ID, "left").score(texts())
    for scores in run_processes(2, sharded_scores, small_config()):
        assert scores == pytest.approx([score.log_probability for score in alone], abs=1e-4)


def test_a_split_model_is_refused() -> None:
    stage = small_stage(small_config())
    stage.names = stage.names[:-1]
    with pytest.raises(ConfigurationError, match=r"parallel\.pipeline=1"):
        StageScorer(stage, PAD_ID, "left")


def test_padding_is_that_of_training() -> None:
    block, vanilla = small_config(), small_config("vanilla")
    padded, unpadded = (DataConfig(path="x", random_left_padding=value) for value in (True, False))
    mixed = DataConfig(sources={"a": SourceConfig(path="x"), "b": SourceConfig(path="y", random_left_padding=False)})
    assert [choose_padding("auto", block, data) for data in (None, padded, mixed, unpadded)] == [*["left"] * 3, "none"]
    assert choose_padding("none", block, padded) == "none"
    assert choose_padding("auto", vanilla, padded) is None
    with pytest.raises(ConfigurationError, match="--padding left is for block models"):
        choose_padding("left", vanilla, padded)
    assert TextLayout.of(block, "left").padded_length(2) == 8
