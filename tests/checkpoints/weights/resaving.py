"""Loads a checkpoint into several processes and writes it again; its own module, so that processes can import it."""

from pathlib import Path

import torch.distributed

from checkpoints.fragments import write_fragments
from checkpoints.records import Fragment, read_manifest
from checkpoints.store import CheckpointStore
from checkpoints.trained_model import find_trained_model
from parallel.config import ParallelConfig
from parallel.sharding import parameter_shard
from parallel.topology import initialize_topology

LAYOUT = ParallelConfig(tensor=2, pipeline=2)


def resave(source: Path, target: Path) -> None:
    """One of four ranks loads its part of a checkpoint and writes it again."""
    place = initialize_topology(LAYOUT)
    trained = find_trained_model(source)
    stage = trained.load(LAYOUT)
    fragments = []
    for name, parameter in stage.named_parameters():
        shard = parameter_shard(parameter)
        if shard.axis is None and place.tensor_rank:
            continue
        values = parameter.detach().flatten()
        span = (shard.axis, shard.start, shard.stop, 0, values.numel())
        fragments.append((Fragment(name, "weight", shard.global_shape, *span), values))
    store = CheckpointStore(target / "checkpoints")
    temporary: list[Path | None] = [store.begin(0) if place.rank == 0 else None]
    torch.distributed.broadcast_object_list(temporary)
    assert temporary[0] is not None
    record = write_fragments(temporary[0] / f"rank_{place.rank:05d}.safetensors", fragments)
    records = [record] * LAYOUT.world_size
    torch.distributed.all_gather_object(records, record)
    if place.rank == 0:
        store.publish(0, temporary[0], records, read_manifest(trained.path).metadata)
    torch.distributed.barrier()
