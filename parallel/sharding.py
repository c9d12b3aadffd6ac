"""Which part of a global parameter this tensor-parallel rank holds."""

from dataclasses import dataclass

from megatron.core import parallel_state
from torch import Tensor
from torch.nn import Parameter


@dataclass(frozen=True)
class Shard:
    """A slice of a global tensor along one axis.

    Attributes:
        global_shape: shape of the whole parameter.
        axis: the axis that tensor parallelism splits; None if the parameter is replicated.
        start: first global row along the axis (0 if replicated).
        stop: one past the last (the size of the first axis if replicated).
    """

    global_shape: tuple[int, ...]
    axis: int | None
    start: int
    stop: int

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the slice."""
        if self.axis is None:
            return self.global_shape
        return tuple(self.stop - self.start if i == self.axis else n for i, n in enumerate(self.global_shape))


def parameter_shard(parameter: Parameter) -> Shard:
    """The shard a parameter is, from Megatron-core's attributes; works on ZeRO-3 partitioned parameters too."""
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    if not getattr(parameter, "tensor_model_parallel", False):
        return Shard(shape, None, 0, shape[0])
    axis = int(parameter.partition_dim)  # type: ignore[attr-defined]
    size = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    rows = shape[axis]
    whole = tuple(n * size if i == axis else n for i, n in enumerate(shape))
    return Shard(whole, axis, rank * rows, (rank + 1) * rows)


def local_slice(full: Tensor, shard: Shard) -> Tensor:
    """Cuts this rank's shard out of the global tensor."""
    if shard.axis is None:
        return full
    return full.narrow(shard.axis, shard.start, shard.stop - shard.start)
