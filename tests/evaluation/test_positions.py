"""Loss by position against one slow forward pass for each chunk."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.errors import DataError
from data.tokenizer import Tokenizer
from evaluation import plots
from evaluation.documents import DocumentChunks, chunk_length, read_chunks
from evaluation.positions import bin_edges, evaluate_positions
from parallel.errors import ConfigurationError
from parallel.inputs import MicroBatch
from parallel.stage import Stage
from tests.evaluation.text import book, small_model, small_stage, small_tokenizer

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def write_documents(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def text_of_tokens(tokenizer: Tokenizer, count: int) -> str:
    """A text of exactly so many tokens."""
    ids = tokenizer.encode(book()[60_000:80_000])
    while len(tokenizer.encode(tokenizer.decode(ids[:count]))) != count:
        ids = ids[1:]
    return tokenizer.decode(ids[:count])


def slow_losses(stage: Stage, ids: np.ndarray) -> list[float]:
    """Losses of one chunk, from the first predicted position to the last."""
    batch = torch.from_numpy(ids.astype(np.int64))[None]
    unit = stage.model_config.unit_length
    with torch.no_grad():
        logits = stage.logits(MicroBatch(batch, torch.ones_like(batch, dtype=torch.bool)))
    logits = logits.reshape(batch.shape[1], -1)[:-unit]
    return F.cross_entropy(logits.double(), batch[0, unit:], reduction="none").tolist()


def test_chunks_are_whole_and_nothing_is_lost_at_a_boundary(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = [text_of_tokens(tokenizer, count) for count in (63, 64, 65, 128, 191, 0, 8)]
    chunks = read_chunks(write_documents(tmp_path / "books.jsonl", texts), "--documents", tokenizer, 64)
    assert chunks.token_ids.shape == (0 + 1 + 1 + 2 + 2, 64)
    assert (chunks.documents, chunks.too_short, chunks.left_over) == (4, 2, 63 + 1 + 63 + 8)
    assert chunks.token_ids[0].tolist() == tokenizer.encode(texts[1])
    assert chunks.token_ids[2:4].flatten().tolist() == tokenizer.encode(texts[3])


def test_a_limit_takes_a_sample_of_all_documents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_documents(tmp_path / "books.jsonl", [book()[at : at + 4000] for at in range(0, 40_000, 4000)])
    every = read_chunks(path, "--documents", tokenizer, 64)
    some = read_chunks(path, "--documents", tokenizer, 64, limit=30)
    again = read_chunks(path, "--documents", tokenizer, 64, limit=30)
    assert (len(some), some.available) == (30, len(every))
    assert np.array_equal(some.token_ids, again.token_ids)
    rows = [row.tolist() for row in every.token_ids]
    places = [rows.index(row.tolist()) for row in some.token_ids]
    assert places == sorted(set(places))
    assert places[0] < len(every) / 4
    assert places[-1] > len(every) * 3 / 4


@pytest.mark.parametrize(
    ("kind", "length"), [("prefix", 4), ("prefix", 1), ("summation", 4), ("cross_attention", 2), ("vanilla", 1)]
)
def test_every_position_equals_a_slow_computation(tmp_path: Path, tokenizer: Tokenizer, kind: str, length: int) -> None:
    stage = small_stage(kind, length)
    # Longer than the model's 64 tokens, seven chunks in batches of three.
    chunks = read_chunks(
        write_documents(tmp_path / "books.jsonl", [book()[9000:9900]]), "--documents", tokenizer, 72, limit=7
    )
    result = evaluate_positions(stage, chunks, batch_tokens=3 * 72)
    slow = np.array([slow_losses(stage, ids) for ids in chunks.token_ids])
    assert slow.shape == (7, 72 - length)
    assert result.by_position == pytest.approx(slow.mean(axis=0).tolist(), abs=1e-5)
    assert result.loss.mean == pytest.approx(slow.mean(), abs=1e-6)
    assert result.loss.error == pytest.approx(slow.mean(axis=1).std(ddof=1) / math.sqrt(7), abs=1e-6)
    assert result.perplexity == pytest.approx(math.exp(slow.mean()), rel=1e-5)
    assert [one.mean for one in result.in_block] == pytest.approx(
        [slow[:, place::length].mean() for place in range(length)], abs=1e-6
    )
    assert (result.bins[0].first, result.bins[-1].last) == (length, 71)
    for one in result.bins:
        inside = slow[:, one.first - length : one.last + 1 - length]
        assert one.loss.mean == pytest.approx(inside.mean(), abs=1e-6)
        assert one.loss.error == pytest.approx(inside.mean(axis=1).std(ddof=1) / math.sqrt(7), abs=1e-6)
    quarter = (72 // length - 1) // 4 * length
    gains = slow[:, :quarter].mean(axis=1) - slow[:, -quarter:].mean(axis=1)
    assert result.gain.mean == pytest.approx(gains.mean(), abs=1e-6)
    by_block = slow.reshape(7, -1, length).mean(axis=2)
    slopes = [np.polyfit(np.log2(np.arange(1, 72 // length)), one, 1)[0] for one in by_block]
    assert result.per_doubling.mean == pytest.approx(np.mean(slopes), abs=1e-6)
    assert result.per_doubling.error == pytest.approx(np.std(slopes, ddof=1) / math.sqrt(7), abs=1e-6)


def test_bins_cover_every_unit_once() -> None:
    for units in (2, 3, 7, 512, 2048):
        edges = bin_edges(units)
        assert edges == sorted(set(edges))
        assert (edges[0], edges[-1]) == (1, units)
    assert bin_edges(16) == [1, 2, 3, 4, 6, 8, 11, 16]


def one_chunk() -> DocumentChunks:
    return DocumentChunks(np.arange(64, dtype=np.int32)[None], documents=1, too_short=0, available=1, left_over=0)


def test_results_are_shown_stored_and_drawn(tmp_path: Path) -> None:
    result = evaluate_positions(small_stage(), one_chunk(), batch_tokens=64)
    stored = json.dumps(result.to_json(), allow_nan=False)
    assert len(json.loads(stored)["by_position"]) == 60
    assert json.loads(stored)["loss"]["standard_error"] is None, "one chunk tells no error"
    assert any("gain over the context" in line for line in result.lines())
    assert set(result.scalars()) >= {"loss", "perplexity", "gain", "in_block/4"}
    paths = result.draw(tmp_path)
    assert [path.name for path in paths] == ["positions.png", "positions_in_block.png"]
    assert all(path.read_bytes().startswith(PNG) for path in paths)
    vanilla = evaluate_positions(small_stage("vanilla"), one_chunk(), batch_tokens=64)
    assert [path.name for path in vanilla.draw(tmp_path)] == ["positions.png"]


def test_without_matplotlib_there_are_numbers_and_a_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = evaluate_positions(small_stage(), one_chunk(), batch_tokens=64)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    plots.can_plot.cache_clear()
    assert result.draw(tmp_path) == result.draw(tmp_path) == []
    plots.can_plot.cache_clear()
    assert capsys.readouterr().err.count("pip install") == 1


def test_bad_input_is_one_sentence(tmp_path: Path, tokenizer: Tokenizer) -> None:
    short = write_documents(tmp_path / "short.jsonl", [text_of_tokens(tokenizer, 40)])
    with pytest.raises(DataError, match="holds no document of 64 tokens, the longest has 40"):
        read_chunks(short, "--documents", tokenizer, 64)
    with pytest.raises(DataError, match="does not exist"):
        read_chunks(tmp_path / "absent.jsonl", "--documents", tokenizer, 64)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"--documents .*folder finds no file"):
        read_chunks(tmp_path / "folder", "--documents", tokenizer, 64)
    model = small_model()
    assert chunk_length(model, None, "--context-length") == 64
    with pytest.raises(ConfigurationError, match=r"--context-length 66 .*4 tokens.* use 64"):
        chunk_length(model, 66, "--context-length")
    with pytest.raises(ConfigurationError, match=r"--context-length 4 .* use 8"):
        chunk_length(model, 4, "--context-length")
    with pytest.raises(ConfigurationError, match=r"--context-length 1 .* use 2"):
        chunk_length(small_model("vanilla"), 1, "--context-length")
