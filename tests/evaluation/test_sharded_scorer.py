"""Scores of a model that is spread over processes equal those of the whole model in one."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

from evaluation.padding import Padding
from evaluation.scoring import Score, ScoredText
from evaluation.sharded_scorer import ShardedScorer
from evaluation.stage_scorer import StageScorer
from parallel.config import ModelConfig, ParallelConfig
from parallel.errors import ConfigurationError
from parallel.inputs import MicroBatch
from parallel.linear_cross_entropy import most_likely
from parallel.stage import build_stage
from parallel.topology import coordinates, initialize_topology
from tests.inference.models import PAD_ID, VOCAB_SIZE, small_config, small_stage
from tests.processes import run_processes
from train.config import OptimizerConfig
from train.selftest_models import MODELS
from train.step import StepEngine

CONFIGS = {
    "block": small_config(),
    "vanilla": small_config("vanilla"),
    "cross-attention": MODELS["cross-attention"].model_copy(update={"vocab_size": VOCAB_SIZE, "initializer_std": 0.6}),
}
LAYOUTS = (
    ParallelConfig(data=2),
    ParallelConfig(data=2, zero_stage=3),
    ParallelConfig(tensor=2),
    ParallelConfig(tensor=2, sequence_parallel=True),
    ParallelConfig(pipeline=2),
)
BATCH_TOKENS = 72


def texts() -> dict[str, list[ScoredText]]:
    """Many texts of mixed lengths, some too long; fewer than there are processes; none, or none that is scored.

    One is continued by every token, of which one must be the most likely.
    """
    drawn = random.Random(3)

    def text(context: int, continuation: int) -> ScoredText:
        tokens = [drawn.randrange(VOCAB_SIZE) for _ in range(context + continuation)]
        return ScoredText(tokens[:context], tokens[context:])

    mixed = [text(drawn.randrange(45), drawn.choice((1, 1, 2, 9))) for _ in range(40)]
    context = text(7, 0).context
    continued = [ScoredText(context, [token]) for token in range(VOCAB_SIZE)]
    few = {"one": [text(9, 1)], "unscored": [text(1, 0)], "none": []}
    return {"mixed": [*mixed, text(4, 0)], "continued": continued, **few}


def cases(parallel: ParallelConfig) -> list[tuple[str, Padding]]:
    """Models and paddings under a layout; the variant where a pipeline carries more than a text's own vectors."""
    names = ["block", "vanilla", *(["cross-attention"] if parallel.pipeline > 1 else [])]
    return [(name, padding) for name in names for padding in ("left", "none")]  # type: ignore[misc]


@dataclass(frozen=True)
class Scored:
    """What one process has under one layout."""

    scores: dict[str, list[Score]]
    lengths: set[int]
    progress: int


def score_all(engine: StepEngine, config: ModelConfig, parallel: ParallelConfig, padding: Padding) -> Scored:
    lengths: set[int] = set()
    finished: list[int] = []

    def run(batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
        [shape] = {tuple(batch.token_ids.shape) for batch in batches}
        lengths.add(shape[1])
        assert shape[0] == 1 or shape[0] * shape[1] <= BATCH_TOKENS
        return engine.token_scores(batches)

    scorer = ShardedScorer(run, config, parallel, coordinates(), PAD_ID, padding, BATCH_TOKENS)
    scores = {name: scorer.score(requests, finished.append) for name, requests in texts().items()}
    return Scored(scores, lengths, sum(finished))


def score_under_layouts() -> list[Scored]:
    results = []
    for parallel in LAYOUTS:
        initialize_topology(parallel)
        for name, padding in cases(parallel):
            stage = build_stage(CONFIGS[name], parallel, seed=1)
            engine = StepEngine(stage, parallel, OptimizerConfig(learning_rate=1e-3), "fp32", 1)
            results.append(score_all(engine, CONFIGS[name], parallel, padding))
            engine.engine.destroy()
    first_of_equal_logits()
    different_texts()
    return results


def first_of_equal_logits() -> None:
    """As argmax over six tokens, of which each rank has three; of equal ones within a rank, and between two."""
    place = initialize_topology(ParallelConfig(tensor=2))
    whole = torch.tensor([[0.0, 3, 3, 1, 2, 0], [0, 1, 2, 4, 4, 4], [1, 5, 0, 5, 0, 5], [7, 7, 7, 7, 7, 8]])
    mine = whole[:, 3 * place.tensor_rank :][:, :3]
    assert most_likely(mine).tolist() == [1, 3, 1, 5] == whole.argmax(dim=1).tolist()


def different_texts() -> None:
    """Rank 1 has another last token."""
    parallel = ParallelConfig(data=2)
    place = initialize_topology(parallel)
    scorer = ShardedScorer(lambda batches: [], CONFIGS["block"], parallel, place, PAD_ID, "left", BATCH_TOKENS)
    with pytest.raises(ConfigurationError, match="different texts to score"):
        scorer.score([ScoredText([1, 2], [3 + place.rank])])


@pytest.mark.slow
def test_every_layout_scores_as_one_process() -> None:
    expected = {
        (name, padding): StageScorer(small_stage(CONFIGS[name]), PAD_ID, padding)
        for name in CONFIGS
        for padding in ("left", "none")
    }
    planned = [case for parallel in LAYOUTS for case in cases(parallel)]
    for of_rank in run_processes(2, score_under_layouts):
        for (name, padding), scored in zip(planned, of_rank, strict=True):
            for kind, requests in texts().items():
                wanted = expected[name, padding].score(requests)
                got = scored.scores[kind]
                assert [score.log_probability for score in got] == pytest.approx(
                    [score.log_probability for score in wanted], abs=1e-4
                )
                assert [(score.is_greedy, score.scored_tokens) for score in got] == [
                    (score.is_greedy, score.scored_tokens) for score in wanted
                ]
            assert [score.is_greedy for score in scored.scores["continued"]].count(True) == 1
            assert min(scored.lengths) <= 16, "short texts are cheap"
            assert len(scored.lengths) >= 3
            assert scored.progress == sum(map(len, texts().values()))
