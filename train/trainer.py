"""The training loop."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

import torch

from checkpoints.engine_state import load_master_weights, load_optimizer, load_weights
from checkpoints.fragments import FragmentReader
from checkpoints.store import LoadedCheckpoint
from parallel.cpu_adaptation import compute_device
from parallel.errors import ConfigurationError
from parallel.stage import build_stage
from parallel.topology import Coordinates
from train.batches import micro_batch_rows, read_micro_batches
from train.checkpointing import Progress, RunCheckpoints, progress_of
from train.config import RunConfig
from train.initial_weights import initial_weights
from train.metrics import MeanLoss, agree, mean_loss
from train.monitor import Monitor, seconds_since_process_start
from train.rank_zero import on_rank_zero
from train.run_directory import RunDirectory
from train.schedule import learning_rate
from train.step import StepEngine
from train.stop_signals import StopSignals
from train.streams import open_stream
from train.throughput import SpeedMeter
from train.validation import ValidationSet


class Ending(Enum):
    """Why the loop was left."""

    COMPLETE = "complete"
    STOPPED = "stopped by a signal"


@dataclass(frozen=True)
class Outcome:
    """What a call of Trainer.run achieved."""

    ending: Ending
    step: int


class Trainer:
    """Trains one run from its newest checkpoint to its last step.

    All ranks construct it together, after the topology has been laid out.

    Args:
        config: the run.
        place: this process's place in the layout.
        signals: watched since before, so that one that comes during start-up is not lost.
        after_step: called on every rank after each step with the number of steps done.
    """

    def __init__(
        self,
        config: RunConfig,
        place: Coordinates,
        signals: StopSignals,
        after_step: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.config = config
        self.place = place
        self.signals = signals
        self.after_step = after_step
        self.directory = RunDirectory(config)
        on_rank_zero(self.directory.open)
        self.stream = open_stream(config, "train")
        self.validation = ValidationSet(config, place) if config.validation.every else None
        self.checkpoints = RunCheckpoints(config, self.directory.checkpoints)
        self._build(self.checkpoints.newest())
        self.meter = SpeedMeter(config.model, config.parallel.world_size)
        self.monitor = self._monitor() if place.rank == 0 else None
        self._first_step = self.progress.step + 1

    def run(self) -> Outcome:
        """Trains until the last step or until any rank is told to stop; saves in either case.

        Raises:
            CheckpointError: a checkpoint cannot be written.
            DataError: a shard cannot be read.
        """
        try:
            while self.progress.step < self.config.train.last_step:
                stop = self._step()
                self._validate_if_due()
                self._save_if_due(stop)
                if stop:
                    return Outcome(Ending.STOPPED, self.progress.step)
            return Outcome(Ending.COMPLETE, self.progress.step)
        finally:
            self._close()

    def _build(self, checkpoint: LoadedCheckpoint | None) -> None:
        config = self.config
        dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        self.progress = self._checked_progress(checkpoint) if checkpoint else Progress(0, 0, 0, self.stream.fingerprint)
        source = checkpoint.path if checkpoint else on_rank_zero(lambda: initial_weights(config))
        stage = build_stage(config.model, config.parallel, dtype, None if source else config.run.seed)
        reader = FragmentReader(source) if source else None
        if reader:
            load_weights(stage, reader)
        self.engine = StepEngine(
            stage, config.parallel, config.optimizer, config.train.precision, config.train.micro_batch_size
        )
        if reader and checkpoint:
            load_optimizer(self.engine.engine, reader, self.progress.optimizer_steps)
        elif reader:
            load_master_weights(self.engine.engine, reader)
        if reader:
            reader.close()
        self._announce(checkpoint)

    def _checked_progress(self, checkpoint: LoadedCheckpoint) -> Progress:
        progress = progress_of(checkpoint)
        if progress.stream != self.stream.fingerprint:
            raise ConfigurationError(
                f"run {self.config.run.name} was trained on other data: its checkpoint has the fingerprint "
                f"{progress.stream}, {self.config.data.path} gives {self.stream.fingerprint}; restore the shards, "
                "tokenizer and packing, or choose another run.name"
            )
        return progress

    def _announce(self, checkpoint: LoadedCheckpoint | None) -> None:
        if self.place.rank != 0:
            return
        for step, reason in checkpoint.skipped if checkpoint else ():
            print(f"skipped the checkpoint of step {step}: {reason}", flush=True)
        if checkpoint:
            print(f"resuming run {self.config.run.name} at step {checkpoint.step} from {checkpoint.path}", flush=True)
        else:
            weights = self.config.run.initial_weights
            source = f" from the weights in {weights}" if weights else ""
            print(f"starting run {self.config.run.name} in {self.directory.path}{source}", flush=True)
        print(self.stream.describe(), flush=True)

    def _monitor(self) -> Monitor:
        return Monitor(self.config, self.directory.tensorboard, self.progress.step + 1, self.meter)

    def _step(self) -> bool:
        """Takes one optimizer step; returns whether all ranks agree to stop after it."""
        config, progress = self.config, self.progress
        step = progress.step + 1
        rate = learning_rate(config.optimizer, step, config.train.steps)
        self.meter.start_step()
        rows = micro_batch_rows(
            config.train.global_batch_size,
            config.parallel.data,
            self.place.data_rank,
            config.train.micro_batch_size,
        )
        batches = read_micro_batches(self.stream, progress.consumed_sequences, rows, compute_device())
        self.meter.data_ready()
        result = self.engine.train(batches, rate)
        sums, stop = agree(result.sums, self.signals.received is not None)
        self.meter.end_step(config.tokens_per_step)
        loss = mean_loss(sums)
        self.progress = replace(
            progress,
            step=step,
            optimizer_steps=progress.optimizer_steps + (loss.targets > 0),
            consumed_sequences=progress.consumed_sequences + config.train.global_batch_size,
        )
        self._report(loss, rate, result.gradient_norm)
        self.after_step(step)
        return stop

    def _report(self, loss: MeanLoss, rate: float, gradient_norm: float) -> None:
        if self.monitor is None:
            return
        step = self.progress.step
        self.monitor.step(step, loss, rate, gradient_norm, step * self.config.tokens_per_step)
        if step == self._first_step:
            self.monitor.record(step, {"time/to_first_step_seconds": seconds_since_process_start()})

    def _validate_if_due(self) -> None:
        step, every = self.progress.step, self.config.validation.every
        if self.validation is None or (step % every and step != self.config.train.last_step):
            return
        loss = self.validation.loss(self.engine)
        if self.monitor is not None:
            self.monitor.validation(step, loss)

    def _save_if_due(self, stop: bool) -> None:
        step = self.progress.step
        if step % self.config.checkpoint.every and step != self.config.train.last_step and not stop:
            return
        if self.monitor is not None:
            self.monitor.flush()
        started = time.perf_counter()
        path = self.checkpoints.save(self.engine.engine, self.progress)
        if self.monitor is not None:
            self.monitor.saved(step, path, time.perf_counter() - started)

    def _close(self) -> None:
        if self.monitor is not None:
            self.monitor.close()
        self.directory.close()
        self.checkpoints.store.wait()
