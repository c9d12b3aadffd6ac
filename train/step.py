"""One optimizer step over a global batch, for every layout."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from parallel.config import ModelConfig, ParallelConfig
from parallel.cpu_adaptation import compute_device
from parallel.inputs import MicroBatch, count_targets, target_mask
from parallel.partial_gradients import partial_parameters, sum_accumulated, sum_as_they_arise
from parallel.schedule import Forward, LossSums, loss_sums, masked_loss, run_forward, run_schedule
from parallel.stage import Stage
from parallel.stage_clock import PipelineUse, StageClock
from parallel.topology import sum_over_data_parallel
from train.accumulated_gradients import accumulated_gradients
from train.config import OptimizerConfig
from train.discarding import discard_gradients
from train.optimizer import build_engine, clip_replicated


@dataclass(frozen=True)
class Update:
    """What an update did.

    Attributes:
        gradient_norm: global norm before clipping; infinite if it was not finite.
        applied: False if it was not finite: then weights and moments are as before, on all ranks alike.
    """

    gradient_norm: float
    applied: bool


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
        parallel = parallel.without_idle_sharding(precision)
        self.stage = stage
        self.model: ModelConfig = stage.model_config
        self.parallel = parallel
        self.clip = optimizer.clip_gradient_norm
        # Gradients that are reduced during a backward pass need DeepSpeed's own backward.
        reduces_early = parallel.zero_stage >= 2 or parallel.overlap_gradient_reduction
        self._engine_drives_backward = reduces_early and parallel.pipeline == 1
        self._partial = [] if reduces_early else partial_parameters(stage)
        if reduces_early:
            sum_as_they_arise(stage)
        self.engine: Any = build_engine(stage, parallel, optimizer, precision, micro_batch_size)
        self._clock = StageClock(compute_device()) if parallel.pipeline > 1 else None
        stage.config.timers = self._clock

    def accumulate(self, micro_batches: Sequence[MicroBatch]) -> LossSums:
        """Forward and backward of this data-parallel rank's micro-batches of the global batch.

        Gradients are complete afterwards and wait for update or discard; without a single valid target in the global
        batch there are none, and neither is to be called.

        Returns:
            Losses of these micro-batches; zero on all but the last pipeline stage.
        """
        if self._clock is not None:
            self._clock.reset()
        count = self._global_count(micro_batches)
        if count == 0:
            return LossSums.zero(self.model, micro_batches[0].token_ids.device)
        return self._backward(micro_batches, self.parallel.data / count)

    def update(self, learning_rate: float) -> Update:
        """Clips the gradients and applies them, unless their norm is not finite."""
        for group in self.engine.basic_optimizer.param_groups:
            group["lr"] = learning_rate
        if self.parallel.zero_stage:
            self.engine.step()
            return Update(float(self.engine.get_global_grad_norm()), bool(self.engine.was_step_applied()))
        norm = clip_replicated(self.engine, self.clip)
        if not math.isfinite(norm):
            self.discard()
            return Update(math.inf, False)
        self.engine.step()
        return Update(norm, True)

    def pipeline_use(self) -> PipelineUse | None:
        """How the stages of a pipeline spent the last accumulate; None: there is none, or it did nothing."""
        return None if self._clock is None else self._clock.use()

    def discard(self) -> None:
        """Throws the gradients away."""
        discard_gradients(self.engine)

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> LossSums:
        """Losses of this data-parallel rank's micro-batches, without gradients."""
        return run_schedule(self.stage, self.parallel, micro_batches, forward_only=True, forward=self._forward)

    def token_scores(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """What the last piece gives for this data-parallel rank's micro-batches; see parallel.schedule.run_forward."""
        return run_forward(self.stage, self.parallel, micro_batches, self._forward)

    @property
    def _forward(self) -> Forward | None:
        """What gathers the parameters of ZeRO 3."""
        return self.engine if self.parallel.zero_stage == 3 else None

    def _global_count(self, micro_batches: Sequence[MicroBatch]) -> int:
        counts = [count_targets(self.model, batch) for batch in micro_batches]
        return int(sum_over_data_parallel(torch.stack(counts).sum()))

    def _backward(self, micro_batches: Sequence[MicroBatch], scale: float) -> LossSums:
        if self._engine_drives_backward:
            return self._engine_backward(micro_batches, scale)
        self.engine.set_gradient_accumulation_boundary(False)
        with self.engine.coalesce_grad_reduction() if self.parallel.zero_stage == 2 else nullcontext():
            sums = run_schedule(self.stage, self.parallel, micro_batches, scale)
        sum_accumulated(accumulated_gradients(self.engine, self._partial))
        self.engine.set_gradient_accumulation_boundary(True)
        if self.parallel.zero_stage < 2:
            self.engine.allreduce_gradients()
        return sums

    def _engine_backward(self, micro_batches: Sequence[MicroBatch], scale: float) -> LossSums:
        sums = LossSums.zero(self.model, micro_batches[0].token_ids.device)
        for index, batch in enumerate(micro_batches):
            self.engine.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
            token_loss: Tensor = self.engine(batch)
            valid = target_mask(self.model, batch)
            self.engine.backward(masked_loss(token_loss, valid) * scale, scale_wrt_gas=False)
            sums += loss_sums(self.model, token_loss, valid)
        return sums
