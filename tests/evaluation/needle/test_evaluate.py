"""Whole needle tests: of random models, and of one that has learned the answers."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from data.tokenizer import Tokenizer
from evaluation.needle.evaluate import NeedleTest, prepare_needle_test
from evaluation.needle.wording import PROMPT_KINDS
from inference.generator import Generator
from parallel.config import ParallelConfig
from parallel.errors import ConfigurationError
from parallel.inputs import MicroBatch
from parallel.stage import Stage, build_stage
from tests.evaluation.text import book, small_model, small_tokenizer

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def haystack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("haystack") / "book.txt"
    path.write_text(book()[60_000:80_000])
    return path


@pytest.mark.slow
def test_a_random_model_finds_nothing_and_all_is_reported(tmp_path: Path, tokenizer: Tokenizer, haystack: Path) -> None:
    model = small_model(sequence_length=512)
    test = prepare_needle_test(model, tokenizer, haystack, [320, 400], samples=2, depths=(0, 50, 100))
    stage = build_stage(model, ParallelConfig(), seed=1).eval()
    generator = Generator(stage, tokenizer.eos_id, tokenizer.vocab_size)
    result = test.run(generator, batch_tokens=1000)
    places = Counter((cell.prompt, cell.length, cell.depth) for cell in result.cells)
    assert set(places) == {
        (kind, length, depth) for kind in PROMPT_KINDS for length in (320, 400) for depth in (0, 50, 100)
    }
    assert set(places.values()) == {1}
    assert all((cell.hits, cell.samples) == (0, 2) for cell in result.cells)
    assert test.run(generator, batch_tokens=1).cells == result.cells, "batches change nothing"
    stored = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert stored["cells"][0]["example"] == result.cells[0].example != ""
    assert result.scalars()["verbatim/400/found"] == 0
    assert sum(line.startswith(("gemini", "verbatim")) for line in result.lines()) == 4
    paths = result.draw(tmp_path)
    assert [path.name for path in paths] == ["needle_gemini.png", "needle_verbatim.png"]
    assert all(path.read_bytes().startswith(PNG) for path in paths)


@pytest.mark.slow
def test_a_model_that_learned_the_answers_finds_the_needles(tokenizer: Tokenizer, haystack: Path) -> None:
    model = small_model(sequence_length=320)
    test = prepare_needle_test(model, tokenizer, haystack, [320], samples=1, depths=(0, 100))
    stage = build_stage(model.model_copy(update={"initializer_std": 0.1}), ParallelConfig(), seed=1)
    learn(stage, test)
    generator = Generator(stage.eval(), tokenizer.eos_id, tokenizer.vocab_size)
    result = test.run(generator, batch_tokens=1000)
    assert [(cell.hits, cell.leading_digits) for cell in result.cells] == [(1, 7)] * 4
    for cell in result.cells:
        assert test.builder.sample(test.haystack, cell.prompt, 320, cell.depth, 0).number in cell.example
    others = prepare_needle_test(model, tokenizer, haystack, [320], samples=1, depths=(0, 100), seed=5)
    assert sum(cell.hits for cell in others.run(generator, batch_tokens=1000).cells) == 0, (
        "it has learned answers, not to search"
    )


def learn(stage: Stage, test: NeedleTest) -> None:
    """Trains a model on the answers to all prompts of a test, but not on the prompts."""
    tokenizer, unit = test.builder.tokenizer, stage.model_config.unit_length
    rows = []
    for kind in PROMPT_KINDS:
        for depth in test.depths:
            for index in range(test.samples):
                sample = test.builder.sample(test.haystack, kind, 320, depth, index)
                answer = tokenizer.encode(f" {sample.number}.\n") + [tokenizer.eos_id] * 20
                rows.append([*sample.prompt, *answer][:320])
    ids = torch.tensor(rows)
    batch = MicroBatch(ids, torch.ones_like(ids, dtype=torch.bool))
    first = test.builder.prompt_length(320) - unit
    optimizer = torch.optim.Adam(stage.parameters(), lr=5e-3)
    for _ in range(200):
        losses = stage(batch).view(-1, len(ids), unit).transpose(0, 1).reshape(len(ids), -1)[:, first:-unit]
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        if bool((losses < 0.5).all()):  # each token is more likely than all others together
            return
    raise AssertionError("has not learned")


def test_usual_lengths_end_at_the_models(tokenizer: Tokenizer, haystack: Path) -> None:
    def lengths(sequence_length: int) -> tuple[int, ...]:
        return prepare_needle_test(small_model(sequence_length=sequence_length), tokenizer, haystack).lengths

    assert lengths(512) == (512,)
    assert lengths(8192) == (2048, 4096, 8192)
    with pytest.raises(ConfigurationError, match="--needle-lengths 64 is too short"):
        lengths(64)
    with pytest.raises(ConfigurationError, match="--needle-samples 0"):
        prepare_needle_test(small_model(sequence_length=512), tokenizer, haystack, samples=0)
