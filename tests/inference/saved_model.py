"""Writes a model as a checkpoint of a run, in the pieces that a sharded run leaves."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints.fragments import write_fragments
from checkpoints.records import KINDS, Fragment
from checkpoints.store import CheckpointStore
from parallel.config import ModelConfig
from parallel.sharding import parameter_shard
from parallel.stage import Stage


def save_model(root: Path, step: int, stage: Stage, data: dict[str, Any]) -> Path:
    """Publishes the weights as two tensor-parallel ranks with two ZeRO partitions each would; returns the folder."""
    store = CheckpointStore(root)
    temporary = store.begin(step)
    fragments = [piece for name, weight in stage.named_parameters() for piece in _pieces(name, weight)]
    records = [write_fragments(temporary / f"rank_{rank:05d}.safetensors", fragments[rank::4]) for rank in range(4)]
    return store.publish(step, temporary, records, _metadata(stage.model_config, data))


def _metadata(model: ModelConfig, data: dict[str, Any]) -> dict[str, Any]:
    config = {"model": model.model_dump(mode="json"), "data": data, "train": {"steps": 9}}
    return {"config": config, "progress": {"step": 9}}


def _pieces(name: str, weight: torch.nn.Parameter) -> list[tuple[Fragment, Tensor]]:
    axis = parameter_shard(weight).axis
    shape = tuple(weight.shape)
    halves = [weight.detach()] if axis is None else weight.detach().chunk(2, dim=axis)
    pieces = []
    for index, half in enumerate(halves):
        start, stop = (0, shape[0]) if axis is None else (index * half.shape[axis], (index + 1) * half.shape[axis])
        flat, middle = half.reshape(-1), half.numel() // 3
        for low, high in ((0, middle), (middle, half.numel())):
            for kind in KINDS:
                fragment = Fragment(name, kind, shape, axis, start, stop, low, high)
                pieces.append((fragment, flat[low:high] if kind == "weight" else torch.zeros(high - low)))
    return pieces
