"""What of the stream reaches the model in training and validation."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.builders import write_split
from tests.train.small_run import VOCABULARY, small_run
from train.batches import micro_batch_rows, read_micro_batches, split_global_batch
from train.config import RunConfig
from train.streams import open_stream


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    documents = [np.random.default_rng(seed).integers(1, VOCABULARY, 5 + seed % 30) for seed in range(60)]
    write_split(tmp_path / "corpus", documents, shard_tokens=2000, vocab_size=VOCABULARY)
    return small_run(tmp_path, tmp_path, data={"path": str(tmp_path / "corpus"), "isolate_documents": True})


@pytest.mark.parametrize("isolated", [True, False])
def test_ids_masks_and_documents_arrive(config: RunConfig, isolated: bool) -> None:
    data = config.data.model_copy(update={"isolate_documents": isolated})
    stream = open_stream(config.model_copy(update={"data": data}), "train")
    rows = micro_batch_rows(8, data_size=2, data_rank=1, micro_batch_size=2)
    assert rows == [range(2, 4), range(6, 8)]
    batches = read_micro_batches(stream, 3, rows, torch.device("cpu"))
    for batch, row in zip(batches, rows, strict=True):
        expected = stream.read(3 + row.start, len(row))
        assert torch.equal(batch.token_ids, torch.from_numpy(expected.token_ids))
        assert torch.equal(batch.mask, torch.from_numpy(expected.mask))
        if isolated:
            assert expected.documents is not None
            assert batch.documents is not None
            assert torch.equal(batch.documents, torch.from_numpy(expected.documents))
            assert len(batch.documents.unique()) > 2
        else:
            assert batch.documents is None


def test_a_global_batch_is_split_with_its_documents(config: RunConfig) -> None:
    stream = open_stream(config, "train")
    (whole,) = read_micro_batches(stream, 0, [range(8)], torch.device("cpu"))
    parts = split_global_batch(whole, data_size=2, data_rank=1, micro_batch_size=2)
    read = read_micro_batches(stream, 0, [range(2, 4), range(6, 8)], torch.device("cpu"))
    for part, expected in zip(parts, read, strict=True):
        for name in ("token_ids", "mask", "documents"):
            assert torch.equal(getattr(part, name), getattr(expected, name))
