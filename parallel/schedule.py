"""Runs all micro-batches of a step through the pipeline with Megatron-core's schedules (1F1B if pipelined)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

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
# What becomes of a micro-batch's output: the loss, the number of its targets, and what is returned of it.
Finish = Callable[[MicroBatch, Tensor], tuple[Tensor, Tensor, Any]]


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


def boundary_shape(config: ModelConfig, parallel: ParallelConfig, name: str, batch_shape: Shape) -> Shape:
    """Shape of the hidden states that enter the piece `name`, for token ids of a shape [B, S]."""
    splits_rows = parallel.sequence_parallel
    if name.startswith("token_decoder") and name != "token_decoder.input":
        splits_rows = splits_rows or parallel.block_parallel
    divisor = parallel.tensor if splits_rows else 1
    sequences, length = batch_shape
    units = length // config.unit_length
    if not config.is_block:
        return units // divisor, sequences, config.vanilla.hidden_size
    if name.startswith("token_decoder") and name != "token_decoder.input":
        return units * sequences // divisor, config.carried_length, config.tokens.hidden_size
    return units // divisor, sequences, config.blocks.hidden_size


def _shape_adjuster(stage: Stage, parallel: ParallelConfig, batch_shape: Shape) -> Callable[..., object] | None:
    """Megatron-core's hook for shapes that differ from cut to cut; its schedule without a pipeline takes none."""
    if parallel.pipeline == 1:
        return None
    config = stage.model_config
    place = coordinates()
    received = boundary_shape(config, parallel, stage.names[0], batch_shape)
    sent = received
    if not place.is_last_stage:
        following = pipeline_split(config, parallel.pipeline)[place.pipeline_rank + 1]
        sent = boundary_shape(config, parallel, following[0].name, batch_shape)
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
    finish = partial(_scaled_loss, config, loss_scale)
    results = _run(stage, parallel, micro_batches, finish, forward_only, forward)
    return sum(results, LossSums.zero(config, micro_batches[0].token_ids.device))


def run_forward(
    stage: Stage, parallel: ParallelConfig, micro_batches: Sequence[MicroBatch], forward: Forward | None = None
) -> list[Tensor]:
    """What the last piece gives for each micro-batch, without gradients; arguments as those of run_schedule.

    The micro-batches may be of any length, of which all have the same.

    Returns:
        An output for each; nothing on all but the last pipeline stage.
    """
    with torch.no_grad():
        return _run(stage, parallel, micro_batches, _whole_output, True, forward)


def _run(
    stage: Stage,
    parallel: ParallelConfig,
    micro_batches: Sequence[MicroBatch],
    finish: Finish,
    forward_only: bool,
    forward: Forward | None,
) -> list[Any]:
    """Runs micro-batches of one shape; gives what `finish` returns of each on the last pipeline stage."""
    call = forward or stage

    def forward_step(batches: Iterator[MicroBatch], _model: Stage) -> tuple[Tensor, Callable[..., object]]:
        batch = next(batches)
        return call(batch), partial(finish, batch)

    sequences, length = micro_batches[0].token_ids.shape
    with cpu_schedule():
        results: list[Any] = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(micro_batches),
            model=stage,
            num_microbatches=len(micro_batches),
            seq_length=length,
            micro_batch_size=sequences,
            forward_only=forward_only,
            adjust_tensor_shapes_fn=_shape_adjuster(stage, parallel, (sequences, length)),
        )
    return results


def _scaled_loss(
    config: ModelConfig, scale: float, batch: MicroBatch, token_loss: Tensor
) -> tuple[Tensor, Tensor, LossSums]:
    """Loss in the three-value form, which Megatron-core does not divide by the number of micro-batches."""
    valid = target_mask(config, batch)
    sums = loss_sums(config, token_loss, valid)
    return masked_loss(token_loss, valid) * scale, valid.sum().to(torch.int), sums


def _whole_output(batch: MicroBatch, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The output in the same form; nobody asks for the loss."""
    return output.new_zeros(()), torch.zeros((), dtype=torch.int, device=output.device), output
