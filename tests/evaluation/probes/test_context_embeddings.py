"""The nearest-token probe finds tokens that were planted in the weights."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data.tokenizer import Tokenizer
from evaluation.documents import DocumentChunks, read_chunks
from evaluation.probes.context_embeddings import check_context_embeddings, probe_context_embeddings
from parallel.errors import ConfigurationError
from parallel.stage import Stage
from tests.evaluation.text import book, small_model, small_stage, small_tokenizer

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def chunks(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> DocumentChunks:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text(book()[60_000:64_000])
    return read_chunks(path, "--documents", tokenizer, 64)


def plant_copies(stage: Stage) -> None:
    """Makes prefix 1 the embedding of a block's first token, and prefix 2 that of its last one."""
    weights = dict(stage.named_parameters())
    lookup = weights["embedder.embedding.weight"]
    with torch.no_grad():
        lookup -= lookup.mean(dim=1, keepdim=True)  # then the final norm only scales
        for name, weight in weights.items():
            if name.startswith("block_decoder.layers") and ("dense" in name or "contract" in name):
                weight.zero_()  # the layers add nothing
        width = lookup.shape[1]
        table = weights["token_decoder.input.embedding.weight"]
        table.zero_()[:, :width] = lookup
        expansion = weights["token_decoder.input.expansion.weight"].zero_().view(2, table.shape[1], -1)
        expansion[0, :width, :width] = expansion[1, :width, -width:] = torch.eye(width)


def test_planted_tokens_are_found(tmp_path: Path, tokenizer: Tokenizer, chunks: DocumentChunks) -> None:
    stage = small_stage()
    plant_copies(stage)
    result = probe_context_embeddings(stage, tokenizer, chunks, batch_tokens=3 * 64)
    blocks = chunks.token_ids.reshape(len(chunks), 16, 4)
    current, following = blocks[:, :-1], blocks[:, 1:]
    assert result.blocks == len(chunks) * 15
    for vector, planted in zip(result.vectors, (current[..., :1], current[..., -1:]), strict=True):
        for block, found in ((current, vector.current), (following, vector.following)):
            same = planted == block
            assert found == pytest.approx([*same.mean(axis=(0, 1)), same.any(axis=-1).mean()])
    assert result.vectors[0].current[0] == result.vectors[1].current[3] == 1.0
    assert result.vectors[1].current_by_chance[3] < 0.3, "another block's tokens are others"
    ids, counts = np.unique(current[..., -1], return_counts=True)
    text, share = result.vectors[1].common[0]
    assert share == pytest.approx(counts.max() / counts.sum())
    assert text == tokenizer.decode([int(ids[counts.argmax()])])
    assert len(result.examples) == 8
    assert tokenizer.decode(tokenizer.encode(result.examples[0].current)[-1:]) == result.examples[0].nearest[1]
    json.dumps(result.to_json(), allow_nan=False)
    assert result.scalars()["vector_2/last_of_current"] == 1.0
    [path] = result.draw(tmp_path)
    assert path.read_bytes().startswith(PNG)


@pytest.mark.parametrize("kind", ["summation", "cross_attention"])
def test_other_token_decoders_have_a_vector_for_each_token(
    tokenizer: Tokenizer, chunks: DocumentChunks, kind: str
) -> None:
    stage = small_stage(kind)
    with torch.no_grad():  # each vector is the embedding of one token, whatever the text
        table = stage.get_parameter("token_decoder.input.embedding.weight")
        stage.get_parameter("token_decoder.input.expansion.weight").zero_()
        stage.get_parameter("token_decoder.input.expansion.bias").copy_(table[[300, 301, 302, 303]].flatten())
    result = probe_context_embeddings(stage, tokenizer, chunks, batch_tokens=256)
    assert [vector.common for vector in result.vectors] == [
        ((tokenizer.decode([token]), 1.0),) for token in (300, 301, 302, 303)
    ]
    assert "vector 4 most often" in "\n".join(result.lines())


def test_models_without_context_embeddings_or_table_are_told() -> None:
    check_context_embeddings(small_model())
    with pytest.raises(ConfigurationError, match=r"model\.architecture=block.*--tasks"):
        check_context_embeddings(small_model("vanilla"))
    with pytest.raises(ConfigurationError, match=r"model\.block_length=1"):
        check_context_embeddings(small_model("prefix", 1))
