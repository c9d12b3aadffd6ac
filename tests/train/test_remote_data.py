"""Training on shards behind a faulty HTTP server is training on the directory that it serves."""

import json
import lzma
import shutil
from pathlib import Path

import pytest

from data.manifest import read_manifest
from data.preparation.prepare import PreparationOptions, prepare
from data.preparation.tokenizer_training import train_sentencepiece
from tests.data.streaming.faulty_server import serving
from tests.train.small_run import EXAMPLES, VOCABULARY, small_run
from tests.train.test_resume import run, samples, scalars

PARAGRAPH = 300


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """About eight shards of paragraphs."""
    with lzma.open(EXAMPLES / "validation.jsonl.xz", "rt", encoding="utf-8") as books:
        text = json.loads(next(books))["text"][20_000:]
    paths = []
    for name, start in (("train", 0), ("validation", 20)):
        paths.append(tmp_path / f"{name}.jsonl")
        documents = [text[PARAGRAPH * i : PARAGRAPH * (i + 1)] for i in range(start, start + 20)]
        paths[-1].write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    tokenizer = tmp_path / "tokenizer.model"
    train_sentencepiece([paths[0]], VOCABULARY, tokenizer)
    prepare(
        PreparationOptions(
            inputs=(paths[0],),
            output=tmp_path / "shards",
            tokenizer=tokenizer,
            validation_inputs=(paths[1],),
            shard_tokens=400,
        )
    )
    return tmp_path / "shards"


@pytest.mark.slow
def test_training_over_faulty_http_sees_the_same_sequences(tmp_path: Path, shards: Path) -> None:
    """Two processes share a cache; the server stalls, cuts, is busy and sends wrong bytes; between two attempts the
    cache is lost."""
    length = {"train": {"steps": 10, "global_batch_size": 4}, "checkpoint": {"every": 5}}
    local = small_run(tmp_path, shards, "local", **length)
    run(local)
    records = read_manifest(shards / "train").shards
    assert len(records) > 4
    cache = {"directory": str(tmp_path / "cache"), "stall_seconds": 0.5}
    with serving(shards) as server:
        faults = ("stall", "cut", "busy", "wrong")
        server.faults = {f"train/{record.file}": [fault] for record, fault in zip(records, faults, strict=False)}
        data = {"path": server.url, "cache": cache}
        half = {**length, "train": {**length["train"], "stop_step": 5}}
        run(small_run(tmp_path, shards, "remote", data=data, **half))
        assert not any(server.faults.values())
        assert max(server.requests[f"train/{record.file}"] for record in records[4:]) == 1
        shutil.rmtree(tmp_path / "cache")
        remote = small_run(tmp_path, shards, "remote", data=data, **length)
        run(remote)
    assert samples(remote) == samples(local)
    assert scalars(remote, "train/loss") == scalars(local, "train/loss")
    assert scalars(remote, "validation/loss") == scalars(local, "validation/loss")
