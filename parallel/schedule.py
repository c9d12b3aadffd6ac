"""Runs all micro-batches of a step through the pipeline with Megatron-core's schedules (1F1B if pipelined)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from parallel.config import ModelConfig, ParallelConfig
from parallel.costs import pipeline_split
from parallel.cpu_adaptation import cpu_schedule
from parallel.inputs import MicroBatch, target_mask
from parallel.stage import Stage
from parallel.topology import coordinates

Shape = tuple[int, ...]
Forward = Callable[[MicroBatch], Tensor]


@dataclass(frozen=True)
class LossSums:
    """Sums of cross entropy over valid targets, by position in the block.

    Attributes:
        loss: fp64 [L], nats.
        count: fp64 [L], valid targets.
    """

    loss: Tensor
    count: Tensor

    def __add__(self, other: "LossSums") -> "LossSums":
        return LossSums(self.loss + other.loss, self.count + other.count)

    @classmethod
    def zero(cls, config: ModelConfig, device: torch.device) -> "LossSums":
        """Nothing summed yet."""
        empty = torch.zeros(config.unit_length, dtype=torch.float64, device=device)
        return cls(empty, empty.clone())


def loss_sums(config: ModelConfig, token_loss: Tensor, valid: Tensor) -> LossSums:
    """Sums token losses over valid targets by position in the block; vanilla has one position."""
    mask = valid.reshape(-1, config.unit_length)
    loss = token_loss.detach().reshape(-1, config.unit_length).double()
    return LossSums((loss * mask).sum(dim=0), mask.sum(dim=0).double())


def masked_loss(token_loss: Tensor, valid: Tensor) -> Tensor:
    """Sum of cross entropy over valid targets (scalar, fp32)."""
    return (token_loss * valid).sum()


def boundary_shape(config: ModelConfig, parallel: ParallelConfig, name: str, micro_batch_size: int) -> Shape:
    """Shape of the hidden states that enter the piece `name`."""
    divisor = parallel.tensor if parallel.sequence_parallel else 1
    if not config.is_block:
        return config.sequence_length // divisor, micro_batch_size, config.vanilla.hidden_size
    if name.startswith("token_decoder") and name != "token_decoder.input":
        rows = config.num_blocks * micro_batch_size // divisor
        return rows, config.carried_length, config.tokens.hidden_size
    return config.num_blocks // divisor, micro_batch_size, config.blocks.hidden_size


def _shape_adjuster(stage: Stage, parallel: ParallelConfig, micro_batch_size: int) -> Callable[..., object] | None:
    """Megatron-core's hook for shapes that differ from cut to cut; its schedule without a pipeline takes none."""
    if parallel.pipeline == 1:
        return None
    config = stage.model_config
    place = coordinates()
    received = boundary_shape(config, parallel, stage.names[0], micro_batch_size)
    sent = received
    if not place.is_last_stage:
        following = pipeline_split(config, parallel.pipeline)[place.pipeline_rank + 1]
        sent = boundary_shape(config, parallel, following[0].name, micro_batch_size)
    return lambda _receive, _send: ([received], [sent])


def run_schedule(
    stage: Stage,
    parallel: ParallelConfig,
    micro_batches: Sequence[MicroBatch],
    loss_scale: float = 1.0,
    forward_only: bool = False,
    forward: Forward | None = None,
) -> LossSums:
    """Forward (and backward) of all micro-batches.

    Args:
        stage: this rank's part of the model.
        parallel: the layout.
        micro_batches: this data-parallel rank's micro-batches; each rank of a model replica passes the same ones.
        loss_scale: what the sum of losses is multiplied by before backward.
        forward_only: no gradients.
        forward: what to call with a micro-batch instead of the stage itself (ZeRO 3 needs its engine).

    Returns:
        Sums over this data-parallel rank's micro-batches; zero on all but the last pipeline stage.
    """
    config = stage.model_config
    call = forward or stage

    def forward_step(batches: Iterator[MicroBatch], _model: Stage) -> tuple[Tensor, Callable[..., object]]:
        batch = next(batches)
        return call(batch), partial(_scaled_loss, config, batch, loss_scale)

    with cpu_schedule():
        results: list[LossSums] = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(micro_batches),
            model=stage,
            num_microbatches=len(micro_batches),
            seq_length=config.sequence_length,
            micro_batch_size=len(micro_batches[0].token_ids),
            forward_only=forward_only,
            adjust_tensor_shapes_fn=_shape_adjuster(stage, parallel, len(micro_batches[0].token_ids)),
        )
    return sum(results, LossSums.zero(config, micro_batches[0].token_ids.device))


def _scaled_loss(
    config: ModelConfig, batch: MicroBatch, scale: float, token_loss: Tensor
) -> tuple[Tensor, Tensor, LossSums]:
    """Loss in the three-value form, which Megatron-core does not divide by the number of micro-batches."""
    valid = target_mask(config, batch)
    sums = loss_sums(config, token_loss, valid)
    return masked_loss(token_loss, valid) * scale, valid.sum().to(torch.int), sums
