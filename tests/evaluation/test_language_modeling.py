"""The yardsticks of tools/evaluate_model.py against straightforward computations."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from data.errors import DataError
from evaluation.language_modeling import LanguageModeling, evaluate_language_modeling, unigram_entropy
from parallel.config import ParallelConfig
from parallel.inputs import MicroBatch, target_mask
from parallel.stage import build_stage
from parallel.topology import initialize_topology
from tests.data.builders import write_split
from tests.processes import run_processes
from tests.train.small_run import VOCABULARY, prepare_small_corpus, small_run
from train.streams import open_stream


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_small_corpus(tmp_path_factory.mktemp("corpus"))


def evaluate(shards: Path, kill_context: bool, skip_tokens: int = 0) -> LanguageModeling:
    """Evaluates a random model; with dead context embeddings, exchanging them must change nothing."""
    initialize_topology(ParallelConfig())
    config = small_run(shards.parent, shards)
    stage = build_stage(config.model, ParallelConfig())
    if kill_context:
        with torch.no_grad():
            stage.piece("token_decoder.input").get_parameter("expansion.weight").zero_()
    return evaluate_language_modeling(stage, open_stream(config, "validation"), 20, 8, skip_tokens)


def test_entropy_and_targets_match_a_plain_count(shards: Path) -> None:
    result = run_processes(1, evaluate, shards, False)[0]
    config = small_run(shards.parent, shards)
    sequences = open_stream(config, "validation").read(0, 16)  # two whole batches of eight
    targets = Counter(sequences.token_ids[:, 4:][sequences.mask[:, 4:]].tolist())
    total = sum(targets.values())
    assert result.targets == total
    assert result.unigram_entropy == pytest.approx(-sum(n / total * math.log(n / total) for n in targets.values()))
    assert len(result.loss_by_position) == 4
    assert result.loss == pytest.approx(math.log(384), rel=0.05), "a random model is about uniform"


def test_skipped_tokens_are_no_targets(shards: Path) -> None:
    result = run_processes(1, evaluate, shards, False, 14)[0]
    sequences = open_stream(small_run(shards.parent, shards), "validation").read(0, 16)
    targets = Counter(sequences.token_ids[:, 14:][sequences.mask[:, 14:]].tolist())
    total = sum(targets.values())
    assert result.targets == total
    assert result.unigram_entropy == pytest.approx(-sum(n / total * math.log(n / total) for n in targets.values()))


def test_skipping_whole_sequences_is_an_error(shards: Path) -> None:
    stream = open_stream(small_run(shards.parent, shards), "validation")
    with pytest.raises(DataError, match="--skip-tokens"):
        evaluate_language_modeling(None, stream, 20, 8, stream.sequence_length)  # type: ignore[arg-type]


def test_exchanged_contexts_show_whether_the_block_decoder_is_used(shards: Path) -> None:
    used = run_processes(1, evaluate, shards, False)[0]
    assert used.shuffled_context_loss is not None
    assert used.shuffled_context_loss != pytest.approx(used.loss, abs=1e-9)
    dead = run_processes(1, evaluate, shards, True)[0]
    assert dead.shuffled_context_loss == pytest.approx(dead.loss, abs=1e-9)


def test_entropy_of_uniform_and_certain_counts() -> None:
    assert unigram_entropy(torch.full((8,), 5)) == pytest.approx(math.log(8))
    assert unigram_entropy(torch.tensor([0, 7, 0])) == pytest.approx(0.0)


def test_too_small_a_batch_is_an_error(shards: Path) -> None:
    stream = open_stream(small_run(shards.parent, shards), "validation")
    with pytest.raises(DataError, match="batch size 1"):
        evaluate_language_modeling(None, stream, 20, 1)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="batch size 8"):
        evaluate_language_modeling(None, stream, 4, 8)  # type: ignore[arg-type]


def evaluate_documents(corpus: Path, isolated: bool) -> tuple[LanguageModeling, float, int]:
    """A random model's evaluation, and the loss and number of targets of a plain loop over the same sequences."""
    initialize_topology(ParallelConfig())
    data = {"path": str(corpus), "isolate_documents": isolated}
    config = small_run(corpus, corpus, data=data)
    stage = build_stage(config.model.model_copy(update={"initializer_std": 0.3}), ParallelConfig())
    stream = open_stream(config, "validation")
    total = count = 0.0
    with torch.no_grad():
        for position in range(8):
            read = stream.read(position, 1)
            documents = None if read.documents is None else torch.from_numpy(read.documents)
            batch = MicroBatch(torch.from_numpy(read.token_ids), torch.from_numpy(read.mask), documents)
            valid = target_mask(config.model, batch)
            total += float((stage(batch) * valid).sum())
            count += int(valid.sum())
    return evaluate_language_modeling(stage, stream, 8, 4), total / count, int(count)


def test_documents_are_kept_apart_in_evaluation(tmp_path: Path) -> None:
    documents = [np.random.default_rng(seed).integers(1, VOCABULARY, 5 + seed % 30) for seed in range(60)]
    for split in ("train", "validation"):
        write_split(tmp_path / "corpus", documents, split=split, shard_tokens=2000, vocab_size=VOCABULARY)
    losses = {}
    for isolated in (False, True):
        result, loss, count = run_processes(1, evaluate_documents, tmp_path / "corpus", isolated)[0]
        assert result.loss == pytest.approx(loss, rel=1e-6)
        assert result.targets == count
        losses[isolated] = (loss, count)
    assert losses[True][1] < losses[False][1], "first blocks of documents are no targets"
    assert abs(losses[True][0] - losses[False][0]) > 1e-3, "the text is trivial"
