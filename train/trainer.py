"""The training loop."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch.profiler import record_function

from checkpoints.engine_state import load_master_weights, load_optimizer, load_weights
from checkpoints.fragments import FragmentReader
from checkpoints.store import LoadedCheckpoint
from parallel.compilation import compile_layers, compile_seconds
from parallel.config import ParallelConfig
from parallel.cpu_adaptation import compute_device
from parallel.inputs import MicroBatch
from parallel.planning.policies import stage_policies
from parallel.stage import build_stage
from parallel.topology import Coordinates
from train.attempts import UNKNOWN_END, AttemptRecord, read_attempts
from train.batches import micro_batch_rows, read_micro_batches
from train.checkpointing import Progress, RunCheckpoints, code_version, progress_of
from train.config import RunConfig
from train.evaluator import Evaluator, run_evaluator
from train.hang_guard import HangGuard
from train.initial_weights import initial_weights
from train.metrics import MeanLoss, agree, gather_bad_shards, mean_loss
from train.monitor import Monitor
from train.profiling import StepProfiler
from train.rank_zero import on_rank_zero
from train.requests import Request, Requests
from train.run_directory import RunDirectory
from train.schedule import learning_rate
from train.stability import LossWatch, Verdict
from train.startup import StartupClock
from train.step import StepEngine, Update
from train.streams import continued, open_stream
from train.throughput import SpeedMeter
from train.validation import ValidationSet


class Ending(Enum):
    """Why the loop was left."""

    COMPLETE = "complete"
    STOPPED = "stopped"
    ENDED = "ended for good"


@dataclass(frozen=True)
class Outcome:
    """What a call of Trainer.run achieved."""

    ending: Ending
    step: int
    reason: str | None = None

    def describe(self) -> str:
        """The ending, and its reason if it has one."""
        return self.ending.value + (f": {self.reason}" if self.reason else "")


class Trainer:
    """Trains one run from its newest checkpoint to its last step.

    All ranks construct it together, after the topology has been laid out.

    Args:
        config: the run.
        place: this process's place in the layout.
        requests: watched since before, so that a signal that comes during start-up is not lost.
        after_step: called on every rank after each step with the number of steps done.
        clock: of the time until the first step.
        evaluator: runs tasks; None: there are none.
    """

    def __init__(
        self,
        config: RunConfig,
        place: Coordinates,
        requests: Requests,
        after_step: Callable[[int], None] = lambda step: None,
        clock: StartupClock | None = None,
        evaluator: Evaluator | None = None,
    ) -> None:
        self.config = config
        self.place = place
        self.requests = requests
        self.after_step = after_step
        self.clock = clock or StartupClock()
        self.evaluator = evaluator
        self.directory = RunDirectory(config)
        on_rank_zero(self.directory.open)
        self.stream = open_stream(config, "train")
        self.progress = Progress(0, 0, 0, self.stream.identity.model_dump(mode="json"))
        self.attempt: AttemptRecord | None = None
        self.guard = HangGuard(config.stability.hang_timeout_seconds, self._explain_hang)
        self.validation = ValidationSet(config, place) if config.validation.every else None
        self.checkpoints = RunCheckpoints(config, self.directory.checkpoints)
        self.watch = LossWatch(config.stability)
        self._rows = micro_batch_rows(
            config.train.global_batch_size, config.parallel.data, place.data_rank, config.train.micro_batch_size
        )
        self._build(self.checkpoints.newest())
        self.clock.reached("checkpoint")
        self.meter = SpeedMeter(config.model, config.parallel.world_size)
        self.monitor = self._monitor() if place.rank == 0 else None
        self._first_step = self.progress.step + 1
        self.profiler = StepProfiler(self.directory.tensorboard / "profile", place, config.train.profile)
        self._failed_saves = 0
        if place.rank == 0:
            self.attempt = self._new_attempt()

    def run(self) -> Outcome:
        """Trains until the last step or until any rank is told to stop; saves in either case.

        Raises:
            CheckpointError: a checkpoint cannot be written.
            DataError: a shard cannot be read.
        """
        try:
            outcome = self._loop()
        except BaseException as error:
            self._note_end(f"{type(error).__name__}: {error}")
            raise
        else:
            self._note_end(outcome.describe())
            return outcome
        finally:
            self._close()

    def _loop(self) -> Outcome:
        request = self._make_up_evaluations()
        while request < Request.STOP and self.progress.step < self.config.train.last_step:
            request = self._step()
            request = self._evaluate_if_due(request)
            self._save_if_due(request)
        if request < Request.STOP:
            return Outcome(Ending.COMPLETE, self.progress.step)
        reason = self.requests.reason(request)
        self.requests.done(request)
        ending = Ending.ENDED if request is Request.END else Ending.STOPPED
        return Outcome(ending, self.progress.step, reason)

    def _new_attempt(self) -> AttemptRecord:
        before = read_attempts(self.directory.path)
        if before and self.monitor is not None:
            self.monitor.restarted(self._first_step, len(before) + 1, before[-1].reason or UNKNOWN_END)
        return AttemptRecord(self.config, self.progress.step, code_version())

    def _note_end(self, reason: str) -> None:
        if self.attempt is not None:
            self.attempt.end(self.progress.step, reason)

    def _build(self, checkpoint: LoadedCheckpoint | None) -> None:
        config = self.config
        dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        beginning = Progress(0, 0, 0, self.stream.identity.model_dump(mode="json"))
        self.progress = self._checked_progress(checkpoint) if checkpoint else beginning
        self.watch.restore(self.progress.recent_losses)
        source = checkpoint.path if checkpoint else on_rank_zero(lambda: initial_weights(config))
        seed = None if source else config.run.seed
        policies = stage_policies(config.workload, self.place.pipeline_rank)
        stage = build_stage(config.model, config.parallel, dtype, seed, policies=policies)
        if config.train.compile_layers:
            compile_layers(stage)
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
        self.directory.check_against(checkpoint.metadata["config"])
        self.stream.leave_out(progress.bad_shards)
        return replace(progress, stream=continued(self.stream, progress.stream, progress.consumed_sequences))

    def _announce(self, checkpoint: LoadedCheckpoint | None) -> None:
        if self.place.rank != 0:
            return
        for step, reason in checkpoint.skipped if checkpoint else ():
            print(f"skipped the checkpoint of step {step}: {reason}", flush=True)
        if checkpoint:
            print(f"resuming run {self.config.run.name} at step {checkpoint.step} from {checkpoint.path}", flush=True)
            written = ParallelConfig.model_validate(checkpoint.metadata["config"]["parallel"])
            if written != self.config.parallel:
                print(f"it was written under {written} and goes on under {self.config.parallel}", flush=True)
        else:
            weights = self.config.run.initial_weights
            source = f" from the weights in {weights}" if weights else ""
            print(f"starting run {self.config.run.name} in {self.directory.path}{source}", flush=True)
        print(self.stream.describe(), flush=True)

    def _monitor(self) -> Monitor:
        return Monitor(self.config, self.directory.tensorboard, self.progress.step + 1, self.meter)

    def _step(self) -> Request:
        """Takes one step; returns the most urgent request of any rank."""
        config = self.config
        self.guard.progress()
        self.meter.start_step()
        position = self._next_position()
        with record_function("data"):
            batches = self._read(position)
        empty = self.stream.take_empty_sequences()
        self.meter.data_ready()
        if self.progress.step + 1 == self._first_step:
            self.clock.reached("first_batch")
        with record_function("forward and backward"):
            sums = self.engine.accumulate(batches)
        agreed = agree(sums, self.requests.pending(), empty)
        loss, request = mean_loss(agreed.sums), agreed.request
        verdict, problem = self.watch.judge(loss)
        if verdict is Verdict.ROLL_BACK:
            self._roll_back(position, str(problem))
            return request
        rate = learning_rate(config.optimizer, self.progress.step + 1, config.train.steps)
        with record_function("optimizer"):
            update = self._update(loss, verdict, rate)
        self.meter.end_step(config.tokens_per_step)
        self._advance(position, loss, update, agreed.empty_sequences)
        with record_function("logging"):
            self._report(loss, rate, update.gradient_norm, problem)
        self.profiler.step()
        self.after_step(self.progress.step)
        return request

    def _read(self, position: int) -> list[MicroBatch]:
        """This rank's micro-batches; a shard that any rank finds bad is left out by all, and all read again."""
        while True:
            self.stream.take_empty_sequences()
            batches = read_micro_batches(self.stream, position, self._rows, compute_device())
            if self.config.data.bad_shards != "skip":
                return batches
            found = gather_bad_shards(self.stream.take_found_bad_shards())
            if not found:
                return batches
            self.stream.leave_out(found)
            self.progress = replace(self.progress, bad_shards=(*self.progress.bad_shards, *found))
            if self.monitor is not None:
                self.monitor.left_out(found.values())

    def _next_position(self) -> int:
        """Where in the stream the next global batch starts, past those that are left out."""
        position = self.progress.consumed_sequences
        while position in self.progress.left_out:
            position += self.config.train.global_batch_size
        return position

    def _update(self, loss: MeanLoss, verdict: Verdict, rate: float) -> Update:
        if loss.targets == 0:
            return Update(0.0, False)
        if verdict is Verdict.SKIP:
            self.engine.discard()
            return Update(math.nan, False)
        return self.engine.update(rate)

    def _advance(self, position: int, loss: MeanLoss, update: Update, empty_sequences: int) -> None:
        skipped = loss.targets > 0 and not update.applied
        self.progress = replace(
            self.progress,
            step=self.progress.step + 1,
            optimizer_steps=self.progress.optimizer_steps + update.applied,
            consumed_sequences=position + self.config.train.global_batch_size,
            skipped_steps=self.progress.skipped_steps + skipped,
            skipped_in_a_row=self.progress.skipped_in_a_row + 1 if skipped else 0,
            empty_sequences=self.progress.empty_sequences + empty_sequences,
        )
        self.progress = replace(
            self.progress,
            validation_due=self.validation is not None and self._is_due(self.config.validation.every),
            tasks_due=self.evaluator is not None and self._is_due(self.config.tasks.every),
        )

    def _is_due(self, every: int) -> bool:
        """Whether what is done every so many steps, and at last, is done after this one."""
        step = self.progress.step
        return step % every == 0 or step == self.config.train.last_step

    def _roll_back(self, position: int, problem: str) -> None:
        """Goes back to the newest checkpoint, and leaves this step's batch out from then on."""
        step, left_out = self.progress.step + 1, {*self.progress.left_out, position}
        bad_shards = self.progress.bad_shards
        self.watch.rolled_back(step, problem)
        self.checkpoints.wait()
        self.engine.engine.destroy()
        self._build(self.checkpoints.newest())
        self.progress = replace(self.progress, left_out=tuple(sorted(left_out)), bad_shards=bad_shards)
        if self.monitor is not None:
            self.monitor.rolled_back(step, self.progress.step, problem)

    def _report(self, loss: MeanLoss, rate: float, gradient_norm: float, problem: str | None) -> None:
        pipeline = self.engine.pipeline_use()  # of all stages, so every rank asks
        step, is_skipped = self.progress.step, self.progress.skipped_in_a_row > 0
        problem = problem or (f"the gradient norm is {gradient_norm}" if is_skipped else None)
        if self.monitor is not None:
            self.monitor.step(step, loss, rate, gradient_norm, self.progress, pipeline)
            if problem:
                self.monitor.unusual(step, problem, is_skipped, self.progress.skipped_steps)
            if step == self._first_step:
                self._report_startup()
        self.watch.check_skipped(self.progress, str(problem))

    def _explain_hang(self) -> None:
        """Says what is about to happen; the rank whose stack is not in a collective is the one that the others miss."""
        waited = f"{self.guard.timeout:g} s (stability.hang_timeout_seconds)"
        reason = f"no progress for {waited} after step {self.progress.step}"
        # Not an "error:", by which the job scripts know what a restart would meet again.
        print(f"hang: rank {self.place.rank}: {reason}; the stacks of all its threads follow", file=sys.stderr)
        self._note_end(reason)

    def _report_startup(self) -> None:
        self.clock.reached("first_step")
        if self.config.train.compile_layers:
            self.clock.split("first_step", "compilation", compile_seconds())
        if self.monitor is not None and self.attempt is not None:
            self.monitor.started(self._first_step, self.clock)
            self.attempt.first_step_done(self.clock.seconds)

    def _make_up_evaluations(self) -> Request:
        """Does the evaluations that the attempt before was stopped in, and notes that they are done."""
        before = self.progress
        request = self._evaluate_if_due(Request.NONE)
        if self.progress != before:
            self._save()
            self.checkpoints.wait()
        return request

    def _evaluate_if_due(self, request: Request) -> Request:
        """Does what is due after this step, unless any rank is asked to stop; returns the most urgent request."""
        if self.progress.validation_due:
            request = max(request, self._validate())
        if self.progress.tasks_due and request < Request.STOP:
            request = max(request, self._run_tasks())
        return request

    def _validate(self) -> Request:
        """Validates, unless any rank is asked to stop meanwhile; returns the most urgent request."""
        if self.validation is None:
            return Request.NONE
        self.guard.progress()
        loss, request = self.validation.loss(self.engine, self._pending)
        self.progress = replace(self.progress, validation_due=loss is None)
        if self.monitor is not None and loss is not None:
            self.monitor.validation(self.progress.step, loss)
        return request

    def _run_tasks(self) -> Request:
        """Runs the tasks, unless any rank is asked to stop meanwhile; returns the most urgent request."""
        if self.evaluator is None:
            return Request.NONE
        self.guard.progress()
        metrics, request = run_evaluator(self.evaluator, self.engine, self._pending)
        self.progress = replace(self.progress, tasks_due=metrics is None)
        if self.monitor is not None and metrics is not None:
            self.monitor.tasks(self.progress.step, metrics)
        return request

    def _pending(self) -> Request:
        """What this rank is asked for; each part of a long evaluation is progress."""
        self.guard.progress()
        return self.requests.pending()

    def _save_if_due(self, request: Request) -> None:
        step = self.progress.step
        last = step == self.config.train.last_step or request >= Request.STOP
        self._review_saves()
        if step % self.config.checkpoint.every and request is Request.NONE and not last:
            return
        self._save()
        if request is Request.SAVE:
            self.requests.done(request)
        if last:
            self.checkpoints.wait()
            self._review_saves(must_succeed=True)

    def _review_saves(self, must_succeed: bool = False) -> None:
        """Reports saves that have ended; a failed one ends the run if it is the last, or the second in a row."""
        for problem in self.checkpoints.problems():
            print(f"warning: {problem}", flush=True)
        for save in self.checkpoints.finished():
            self._failed_saves = 0 if save.error is None else self._failed_saves + 1
            if self.monitor is not None:
                self.monitor.saved(save)
            if save.error is not None and (must_succeed or self._failed_saves > 1):
                raise save.error

    def _save(self) -> None:
        self.guard.progress()
        if self.progress.optimizer_steps == 0:
            return  # all steps so far were skipped: there are no moments, and a start is as good
        if self.monitor is not None:
            self.monitor.flush()
        self.progress = replace(self.progress, recent_losses=self.watch.recent_losses)
        self.checkpoints.save(self.engine.engine, self.progress)
        self.watch.saved(self.progress.step)

    def _close(self) -> None:
        if self.monitor is not None:
            self.monitor.close()
        self.checkpoints.wait()
        self.guard.stop()  # what is left may take long: deletion, copies elsewhere
        self.checkpoints.close()
        self.directory.close()
        self.profiler.close()
