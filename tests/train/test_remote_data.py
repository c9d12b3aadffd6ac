"""Training on shards behind a faulty HTTP server, and on damaged ones."""

import json
import lzma
import shutil
import signal
from pathlib import Path

import pytest
import torch

from data.manifest import read_manifest
from data.preparation.prepare import PreparationOptions, prepare
from data.preparation.tokenizer_training import train_sentencepiece
from data.streaming.source import BadShard
from parallel.config import ParallelConfig
from parallel.schedule import LossSums
from parallel.topology import initialize_topology
from tests.data.streaming.faulty_server import STALL_SECONDS, serving
from tests.processes import run_processes
from tests.train.small_run import EXAMPLES, VOCABULARY, small_run
from tests.train.test_resume import run, samples, scalars
from train.metrics import agree, gather_bad_shards
from train.requests import Request

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
    cache = {"directory": str(tmp_path / "cache"), "stall_seconds": STALL_SECONDS}
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


@pytest.mark.slow
def test_a_bad_shard_is_left_out_alike_by_any_number_of_processes(tmp_path: Path, shards: Path) -> None:
    """Found in the middle of an epoch by one rank, over a kill after it: losses and counts are the same."""
    records = read_manifest(shards / "train").shards
    damaged = shards / "train" / records[3].file
    content = bytearray(damaged.read_bytes())
    middle = records[3].sample_offsets[0] + records[3].sample_tokens[0] // 2 * 2
    content[middle : middle + 2] = b"\xff\xff"
    damaged.write_bytes(content)
    length = {
        "train": {"steps": 12, "global_batch_size": 4},
        "checkpoint": {"every": 3},
        "data": {"path": str(shards), "bad_shards": "skip"},
    }
    curves = {}
    for name, interruption, layout in (
        ("one", None, {"data": 1}),
        ("two", None, {"data": 2}),
        ("killed", (8, 0, signal.SIGKILL), {"data": 2}),
        ("tensor", None, {"data": 1, "tensor": 2}),
    ):
        config = small_run(tmp_path, shards, name, **length, parallel={"zero_stage": 1, **layout})
        if interruption:
            run(config, interruption)
        run(config)
        curves[name] = (scalars(config, "train/loss"), scalars(config, "progress/empty_sequences"))
    losses, empty = curves["one"]
    assert len(losses) == 12
    assert 0 < empty[-1][1] < 48
    assert empty[0][0] > 1, "the damage is found at once, so the test shows little"
    for name in ("two", "killed", "tensor"):
        assert curves[name][1] == empty
        assert [loss for _, loss in curves[name][0]] == pytest.approx([loss for _, loss in losses], rel=1e-5)


def found_by(ranks: list[int]) -> tuple[int, list[BadShard]]:
    """With two pipeline stages: the empty sequences that all agree on, and the bad shards that some of them found."""
    place = initialize_topology(ParallelConfig(pipeline=2))
    zero = torch.zeros(4, dtype=torch.float64)
    agreed = agree(LossSums(zero, zero), Request.NONE, empty_sequences=3)
    found = {BadShard("corpus", place.rank): "why"} if place.rank in ranks else {}
    return agreed.empty_sequences, list(gather_bad_shards(found))


def test_all_ranks_know_of_bad_shards_and_count_sequences_once() -> None:
    for ranks in ([], [1], [0, 1]):
        assert run_processes(2, found_by, ranks) == [(3, [BadShard("corpus", rank) for rank in ranks])] * 2
