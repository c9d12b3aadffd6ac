"""Console lines, progress bar and TensorBoard, on rank 0 only."""

import json
import os
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from parallel.planning.step_time import stage_balance
from parallel.resident_memory import peak_resident_bytes
from parallel.stage_clock import PipelineUse
from train.checkpointing import FinishedSave, Progress
from train.config import RunConfig
from train.config_file import config_text
from train.evaluator import Metrics
from train.metrics import MeanLoss
from train.process import INTERACTIVE
from train.startup import StartupClock
from train.status import PROGRESS_FILE
from train.throughput import SpeedMeter

MAXIMUM_CLOCK_DIFFERENCE = 10.0  # seconds between the clocks of the nodes of two attempts


def peak_memory_bytes() -> int:
    """Peak memory of this process: the allocator's on GPU, resident set size on CPU."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return peak_resident_bytes()


def _wait_for_a_later_name(folder: Path) -> None:
    """Readers order event files by the second in their names: an attempt's must be later than those before it."""
    newest = max((int(path.name.split(".")[3]) for path in folder.glob("events.out.tfevents.*")), default=0)
    deadline = time.monotonic() + MAXIMUM_CLOCK_DIFFERENCE
    while int(time.time()) <= newest and time.monotonic() < deadline:
        time.sleep(0.05)


class Monitor:
    """Shows and records the progress of a run.

    TensorBoard points carry the step's own values, so a resumed run writes what an undisturbed one would; `purge_step`
    makes readers drop what an interrupted attempt wrote beyond its last checkpoint.
    """

    def __init__(self, config: RunConfig, folder: Path, first_step: int, meter: SpeedMeter) -> None:
        self.config = config
        self.meter = meter
        self._last_step = config.train.last_step
        self._pipeline = _pipeline_values(config)
        self._progress_file = folder.parent / PROGRESS_FILE
        _wait_for_a_later_name(folder)
        self._writer = SummaryWriter(str(folder), purge_step=first_step)
        self._writer.add_text("config", "```yaml\n" + config_text(config) + "```", first_step)
        self._bar: tqdm[None] | None = None
        if os.environ.get(INTERACTIVE) == "1" or sys.stdout.isatty():
            self._bar = tqdm(total=self._last_step, initial=first_step - 1, unit="step", file=sys.stdout)

    def say(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.write(text, file=sys.stdout)

    def step(
        self,
        step: int,
        loss: MeanLoss,
        learning_rate: float,
        gradient_norm: float,
        progress: Progress,
        pipeline: PipelineUse | None = None,
    ) -> None:
        """Records one optimizer step, after which the run stands so; logs it if it is due."""
        if self._bar is not None:
            self._bar.update()
        if step % self.config.logging.every and step != self._last_step:
            return
        data_wait = self.meter.data_wait
        speed = self.meter.read()
        values = {
            "train/loss": loss.loss,
            **_positions("train", loss),
            "optimizer/learning_rate": learning_rate,
            "optimizer/gradient_norm": gradient_norm,
            "progress/tokens": float(step * self.config.tokens_per_step),
            "progress/sequences": float(progress.consumed_sequences),
            "speed/tokens_per_second": speed.tokens_per_second,
            "speed/tflops_per_process": speed.tflops_per_process,
            "speed/data_wait_seconds": data_wait,
            "memory/peak_gib": peak_memory_bytes() / 2**30,
            **self._pipeline,
        }
        if pipeline is not None:
            values |= {f"pipeline/{name}": value for name, value in asdict(pipeline).items()}
        if speed.model_flops_utilization is not None:
            values["speed/mfu"] = speed.model_flops_utilization
        if progress.empty_sequences:
            values["progress/empty_sequences"] = float(progress.empty_sequences)
        self.record(step, values)
        self._note_progress(step, loss.loss, speed.tokens_per_second)
        utilization = "" if speed.model_flops_utilization is None else f"  MFU {speed.model_flops_utilization:.1%}"
        if pipeline is not None:
            utilization += f"  bubble {pipeline.bubble:.0%} ({self._pipeline['pipeline/expected_bubble']:.0%} expected)"
        self.say(
            f"step {step}/{self._last_step}  loss {loss.loss:.4f}  lr {learning_rate:.2e}  norm {gradient_norm:.3f}  "
            f"{speed.tokens_per_second:,.0f} tokens/s  {speed.tflops_per_process:.3f} TFLOP/s{utilization}"
        )

    def _note_progress(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Replaces the small file that tools/status.py reads."""
        values = {"step": step, "loss": loss, "tokens_per_second": tokens_per_second, "time": time.time()}
        temporary = self._progress_file.with_suffix(".tmp")
        with suppress(OSError):  # a full disk is the checkpoint's to report
            temporary.write_text(json.dumps(values), encoding="utf-8")
            temporary.replace(self._progress_file)

    def restarted(self, step: int, attempt: int, reason: str) -> None:
        """Tells why the attempt before ended."""
        text = f"attempt {attempt}; the one before: {reason}"
        self._writer.add_text("attempt", text, step)
        self.say(text)

    def started(self, step: int, clock: StartupClock) -> None:
        """Records the time to an attempt's first step and its split."""
        self.record(step, {f"startup/{phase}_seconds": seconds for phase, seconds in clock.seconds.items()})
        self.record(step, {"startup/total_seconds": clock.total})
        self.say(clock.describe())

    def validation(self, step: int, loss: MeanLoss) -> None:
        """Records a validation loss."""
        self.record(step, {"validation/loss": loss.loss, **_positions("validation", loss)})
        self.say(f"step {step}/{self._last_step}  validation loss {loss.loss:.4f} over {loss.targets:,} tokens")

    def tasks(self, step: int, metrics: Metrics) -> None:
        """Records what tasks say of the model."""
        for task, values in metrics.items():
            self.record(step, {f"evaluation/{task}/{metric}": value for metric, value in values.items()})
            shown = "  ".join(f"{metric} {value:.4f}" for metric, value in values.items())
            self.say(f"step {step}/{self._last_step}  {task}: {shown}")

    def saved(self, save: FinishedSave) -> None:
        """Records a checkpoint: how long it blocked training, and how long it took in all."""
        if save.error is not None:
            self.say(f"warning: the checkpoint of step {save.step} was not saved: {save.error}")
            return
        self.record(
            save.step,
            {"time/checkpoint_blocked_seconds": save.blocked_seconds, "time/checkpoint_seconds": save.seconds},
        )
        self.say(
            f"step {save.step}/{self._last_step}  saved {save.path} in {save.seconds:.1f} s, "
            f"training waited {save.blocked_seconds:.1f} s"
        )

    def left_out(self, reasons: Iterable[str]) -> None:
        """Tells of shards that are left out."""
        for reason in reasons:
            self.say(f"warning: shard left out for good: {reason}")

    def unusual(self, step: int, problem: str, is_skipped: bool, skipped_steps: int) -> None:
        """Tells of a non-finite value or a spike."""
        consequence = f"skipped, {skipped_steps} so far" if is_skipped else "applied all the same"
        self.record(step, {"progress/skipped_steps": float(skipped_steps)})
        self.say(f"warning: step {step}: {problem}; {consequence}")

    def rolled_back(self, step: int, to: int, problem: str) -> None:
        """Tells of a return to a checkpoint."""
        self.record(step, {"progress/rolled_back_to": float(to)})
        self.say(f"warning: step {step}: {problem}; rolled back to step {to}, and its batch is left out from now on")

    def record(self, step: int, values: dict[str, float]) -> None:
        """Writes scalars to TensorBoard."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Forces all points to the file; called before a checkpoint becomes visible, so that none is lost."""
        self._writer.flush()

    def close(self) -> None:
        """Ends the progress bar and the event file."""
        if self._bar is not None:
            self._bar.close()
        self._writer.close()


def _pipeline_values(config: RunConfig) -> dict[str, float]:
    """What the FLOPs of a pipeline's stages say of each step; see parallel.planning.step_time.stage_balance."""
    if config.parallel.pipeline == 1:
        return {}
    bubble, balance = stage_balance(config.workload)
    return {"pipeline/expected_bubble": bubble, "pipeline/expected_stage_balance": balance}


def _positions(split: str, loss: MeanLoss) -> dict[str, float]:
    """Loss by position in the block, from 1; nothing if there is only one."""
    if len(loss.by_position) == 1:
        return {}
    return {f"{split}/loss_by_position/{i}": value for i, value in enumerate(loss.by_position, start=1)}
