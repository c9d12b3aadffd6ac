"""Which parts of the fp32 weights and Adam moments a DeepSpeed engine keeps on this rank, as layout-free fragments.

Reads DeepSpeed 0.19.8's mapping from parameters to its flat fp32 partitions (ZeRO 1 and 2: `_hp_mapping`; ZeRO 3:
`grad_position`; without ZeRO the optimizer holds the parameters themselves). It imports nothing of DeepSpeed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from checkpoints.errors import CheckpointError
from checkpoints.fragments import FragmentReader
from checkpoints.records import KINDS, Fragment
from parallel.sharding import Shard, parameter_shard
from parallel.topology import coordinates

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class OwnedPart:
    """A flat range of one parameter's shard that this rank's optimizer updates.

    Attributes:
        name: global parameter name.
        shard: the tensor-parallel slice that the range refers to.
        start: first element in the flattened slice.
        stop: one past the last.
        partition: the optimizer's flat fp32 tensor.
        offset: where the range starts in it.
    """

    name: str
    shard: Shard
    start: int
    stop: int
    partition: Tensor
    offset: int

    def view(self, tensor: Tensor) -> Tensor:
        """The range inside a tensor laid out like the partition, as a writable 1-D view."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.stop - self.start)


def owned_parts(engine: Any) -> Iterator[OwnedPart]:
    """All non-empty parts this rank owns, in the order of the module's parameters."""
    for name, parameter in engine.module.named_parameters():
        located = _locate(engine, parameter)
        if located is None:
            continue
        partition, offset, start, stop = located
        if stop > start:
            yield OwnedPart(name, parameter_shard(parameter), start, stop, partition, offset)


def _locate(engine: Any, parameter: Parameter) -> tuple[Tensor, int, int, int] | None:
    """(flat partition, offset in it, start and stop in the flattened parameter), or None if another rank owns it."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return parameter, 0, 0, parameter.numel()
    if stage == 3:
        group, offset, size = engine.optimizer.grad_position[engine.optimizer.get_param_id(parameter)]
        start = coordinates().data_rank * size
        stop = min(start + size, int(parameter.ds_numel))  # type: ignore[attr-defined]
        return engine.optimizer.fp32_partitioned_groups_flat[group], offset, start, stop
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    partition = engine.basic_optimizer.param_groups[mapping.param_group_index]["params"][0]
    start = mapping.lp_fragment_address.start
    return partition, mapping.hp_fragment_address.start, start, start + mapping.lp_fragment_address.numel


def _is_replica(engine: Any, part: OwnedPart) -> bool:
    """Whether another rank holds the same values and writes them."""
    place = coordinates()
    if part.shard.axis is None and place.tensor_rank > 0:
        return True
    return engine.zero_optimization_stage() == 0 and place.data_rank > 0


def engine_fragments(engine: Any) -> list[tuple[Fragment, Tensor]]:
    """This rank's share of a checkpoint: fp32 weights and moments, each value on exactly one rank.

    Raises:
        CheckpointError: no optimizer step has been taken, so there are no moments yet.
    """
    fragments: list[tuple[Fragment, Tensor]] = []
    for part in owned_parts(engine):
        if _is_replica(engine, part):
            continue
        state = engine.basic_optimizer.state.get(part.partition)
        if not state:
            raise CheckpointError(f"{part.name} has no Adam moments; save after the first optimizer step")
        sources = {"weight": part.partition, **{kind: state[kind] for kind in MOMENTS}}
        fragments += [(_fragment(part, kind), part.view(source)) for kind, source in sources.items()]
    return fragments


def _fragment(part: OwnedPart, kind: str) -> Fragment:
    shard = part.shard
    return Fragment(part.name, kind, shard.global_shape, shard.axis, shard.start, shard.stop, part.start, part.stop)


def load_weights(module: torch.nn.Module, reader: FragmentReader) -> None:
    """Fills a stage's parameters from a checkpoint, whatever layout wrote it; call before the engine is built.

    Raises:
        CheckpointError: a parameter is missing or has another shape.
    """
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            shard = parameter_shard(parameter)
            _check_shape(reader, name, shard)
            values = reader.read(name, "weight", split_axis=shard.axis, split_start=shard.start, split_stop=shard.stop)
            parameter.copy_(values.view(shard.local_shape))


def load_master_weights(engine: Any, reader: FragmentReader) -> None:
    """Fills the engine's fp32 master weights from weights in full precision; its own come from the rounded stage.

    Args:
        engine: built on a stage that load_weights has filled.
        reader: the checkpoint.
    """
    for part in owned_parts(engine):
        part.view(part.partition).copy_(_read(reader, part, "weight"))


def load_optimizer(engine: Any, reader: FragmentReader, optimizer_steps: int) -> None:
    """Fills the engine's fp32 master weights and Adam moments from a checkpoint, whatever layout wrote it.

    Args:
        engine: built on a stage that load_weights has filled.
        reader: the checkpoint.
        optimizer_steps: updates taken so far (Adam's bias correction).
    """
    for part in owned_parts(engine):
        _check_shape(reader, part.name, part.shard)
        state = _moments(engine.basic_optimizer, part.partition, optimizer_steps)
        for kind, target in zip(KINDS, (part.partition, state["exp_avg"], state["exp_avg_sq"]), strict=True):
            part.view(target).copy_(_read(reader, part, kind))


def _read(reader: FragmentReader, part: OwnedPart, kind: str) -> Tensor:
    return reader.read(
        part.name,
        kind,
        split_axis=part.shard.axis,
        split_start=part.shard.start,
        split_stop=part.shard.stop,
        flat_start=part.start,
        flat_stop=part.stop,
    )


def _moments(optimizer: torch.optim.Optimizer, partition: Tensor, steps: int) -> dict[str, Tensor]:
    """The Adam state of a partition, made as torch makes it if there is none yet."""
    state: dict[str, Tensor] = optimizer.state[partition]
    if not state:
        state["step"] = torch.tensor(float(steps), dtype=torch.float32, device=partition.device)
        state["exp_avg"] = torch.zeros_like(partition.detach())
        state["exp_avg_sq"] = torch.zeros_like(partition.detach())
    return state


def _check_shape(reader: FragmentReader, name: str, shard: Shard) -> None:
    stored = reader.global_shape(name)
    if stored != shard.global_shape:
        raise CheckpointError(
            f"{reader.directory} holds {name} with shape {stored}, the model has {shard.global_shape}; "
            "resume with the model settings of the checkpoint"
        )
