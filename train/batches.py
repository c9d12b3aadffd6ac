"""Which sequences of a global batch go into which micro-batch of which data-parallel rank."""

import torch

from data.streaming.stream import PackedSequences, SequenceStream
from parallel.inputs import MicroBatch


def micro_batch_rows(global_batch: int, data_size: int, data_rank: int, micro_batch_size: int) -> list[range]:
    """Rows of the global batch for each micro-batch of one rank: round after round, micro_batch_size rows per rank."""
    stride = micro_batch_size * data_size
    offset = data_rank * micro_batch_size
    return [range(start + offset, start + offset + micro_batch_size) for start in range(0, global_batch, stride)]


def split_global_batch(batch: MicroBatch, data_size: int, data_rank: int, micro_batch_size: int) -> list[MicroBatch]:
    """This rank's micro-batches of a whole global batch [global batch size, S]."""
    rows = micro_batch_rows(len(batch.token_ids), data_size, data_rank, micro_batch_size)
    return [_rows(batch, row) for row in rows]


def _rows(batch: MicroBatch, rows: range) -> MicroBatch:
    chosen = slice(rows.start, rows.stop)
    documents = None if batch.documents is None else batch.documents[chosen]
    return MicroBatch(batch.token_ids[chosen], batch.mask[chosen], documents)


def read_micro_batches(
    stream: SequenceStream, position: int, rows: list[range], device: torch.device
) -> list[MicroBatch]:
    """Reads micro-batches that start `rows` after a position of the stream."""
    return [_to_device(stream.read(position + row.start, len(row)), device) for row in rows]


def _to_device(sequences: PackedSequences, device: torch.device) -> MicroBatch:
    documents = None if sequences.documents is None else torch.from_numpy(sequences.documents).to(device)
    token_ids, mask = torch.from_numpy(sequences.token_ids), torch.from_numpy(sequences.mask)
    return MicroBatch(token_ids.to(device), mask.to(device), documents)
