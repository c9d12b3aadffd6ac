"""One optimizer step over a global batch, for every layout."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from parallel.config import ModelConfig, ParallelConfig
from parallel.inputs import MicroBatch, count_targets, target_mask
from parallel.schedule import LossSums, loss_sums, masked_loss, run_schedule
from parallel.stage import Stage
from parallel.topology import sum_over_data_parallel
from train.config import OptimizerConfig
from train.optimizer import build_engine, clip_replicated


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did.

    Attributes:
        sums: losses of this data-parallel rank's micro-batches (zero on all but the last pipeline stage).
        gradient_norm: global norm before clipping; 0 if there was no valid target and the step was skipped.
    """

    sums: LossSums
    gradient_norm: float


class StepEngine:
    """Forward, backward and update of this rank's stage.

    The loss is the sum over valid targets divided by their number in the whole global batch. DeepSpeed averages
    gradients over data-parallel ranks, so the sum is scaled by data-parallel size / count before backward.
    """

    def __init__(
        self,
        stage: Stage,
        parallel: ParallelConfig,
        optimizer: OptimizerConfig,
        precision: Literal["fp32", "bf16"],
        micro_batch_size: int,
    ) -> None:
        self.stage = stage
        self.model: ModelConfig = stage.model_config
        self.parallel = parallel
        self.clip = optimizer.clip_gradient_norm
        self.engine: Any = build_engine(stage, parallel, optimizer, precision, micro_batch_size)
        # ZeRO 2 and 3 reduce gradients during each backward pass, which only DeepSpeed's own backward drives.
        self._engine_drives_backward = parallel.zero_stage >= 2 and parallel.pipeline == 1

    def train(self, micro_batches: Sequence[MicroBatch], learning_rate: float) -> StepResult:
        """Runs one optimizer step on this data-parallel rank's micro-batches of the global batch."""
        count = self._global_count(micro_batches)
        if count == 0:
            return StepResult(LossSums.zero(self.model, micro_batches[0].token_ids.device), 0.0)
        for group in self.engine.basic_optimizer.param_groups:
            group["lr"] = learning_rate
        scale = self.parallel.data / count
        sums = self._backward(micro_batches, scale)
        return StepResult(sums, self._update())

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> LossSums:
        """Losses of this data-parallel rank's micro-batches, without gradients."""
        forward = self.engine if self.parallel.zero_stage == 3 else None
        return run_schedule(self.stage, self.parallel, micro_batches, forward_only=True, forward=forward)

    def _global_count(self, micro_batches: Sequence[MicroBatch]) -> int:
        counts = [count_targets(self.model, batch.mask) for batch in micro_batches]
        return int(sum_over_data_parallel(torch.stack(counts).sum()))

    def _backward(self, micro_batches: Sequence[MicroBatch], scale: float) -> LossSums:
        if self._engine_drives_backward:
            return self._engine_backward(micro_batches, scale)
        self.engine.set_gradient_accumulation_boundary(False)
        with self.engine.coalesce_grad_reduction() if self.parallel.zero_stage == 2 else nullcontext():
            sums = run_schedule(self.stage, self.parallel, micro_batches, scale)
        self.engine.set_gradient_accumulation_boundary(True)
        if self.parallel.zero_stage < 2:
            self.engine.allreduce_gradients()
        return sums

    def _engine_backward(self, micro_batches: Sequence[MicroBatch], scale: float) -> LossSums:
        sums = LossSums.zero(self.model, micro_batches[0].token_ids.device)
        for index, batch in enumerate(micro_batches):
            self.engine.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
            token_loss: Tensor = self.engine(batch)
            valid = target_mask(self.model, batch.mask)
            self.engine.backward(masked_loss(token_loss, valid) * scale, scale_wrt_gas=False)
            sums += loss_sums(self.model, token_loss, valid)
        return sums

    def _update(self) -> float:
        if self.parallel.zero_stage:
            self.engine.step()
            return float(self.engine.get_global_grad_norm())
        norm = clip_replicated(self.engine, self.clip)
        self.engine.step()
        return norm
