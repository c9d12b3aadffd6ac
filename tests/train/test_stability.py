"""Non-finite values, spikes, requests and hangs, in real process groups."""

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints.fragments import FragmentReader
from checkpoints.store import CheckpointStore
from parallel.config import ParallelConfig
from parallel.errors import ConfigurationError
from parallel.stage import build_stage
from parallel.topology import initialize_topology
from tests.processes import run_processes
from tests.train.small_run import prepare_small_corpus, small_run
from train.attempts import read_attempts
from train.batches import split_global_batch
from train.config import RunConfig, StabilityConfig
from train.metrics import MeanLoss
from train.requests import Request, Requests
from train.selftest import OPTIMIZER, _gather_whole, selftest_batch
from train.selftest_models import MODELS
from train.stability import MAX_ROLL_BACKS, LossWatch, Verdict
from train.step import StepEngine
from train.stop_signals import StopSignals
from train.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_small_corpus(tmp_path_factory.mktemp("corpus"))


def _discarding_changes_nothing(zero_stage: int, precision: Any) -> float:
    """Largest difference between a run with a discarded step in between and one without."""
    parallel = ParallelConfig(data=2, zero_stage=zero_stage)  # type: ignore[arg-type]
    place = initialize_topology(parallel)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    results = []
    for discards in (False, True):
        stage = build_stage(MODELS["block"], parallel, dtype)
        engine = StepEngine(stage, parallel, OPTIMIZER, precision, 1)
        for step in (0, 2):
            batches = split_global_batch(selftest_batch(MODELS["block"], step), 2, place.data_rank, 1)
            if discards:
                engine.accumulate(split_global_batch(selftest_batch(MODELS["block"], 3), 2, place.data_rank, 1))
                engine.discard()
            engine.accumulate(batches)
            assert engine.update(1e-2).applied
        results.append(_gather_whole(engine, "weight"))
        engine.engine.destroy()
    without, with_discards = results
    return max((float((with_discards[name] - without[name]).abs().max()) for name in without), default=0.0)


@pytest.mark.parametrize(
    ("zero_stage", "precision"),
    [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")],
)
def test_discarded_gradients_leave_no_trace(zero_stage: int, precision: str) -> None:
    assert max(run_processes(2, _discarding_changes_nothing, zero_stage, precision)) == 0.0


def poison_loss(trainer: Trainer) -> None:
    handle = trainer.engine.stage.register_forward_hook(lambda module, inputs, output: output * math.nan)
    trainer.handles = [handle]  # type: ignore[attr-defined]


def poison_gradient(trainer: Trainer) -> None:
    weight = trainer.engine.stage.get_parameter("token_decoder.output.head.weight")
    trainer.handles = [weight.register_hook(lambda gradient: gradient * math.inf)]  # type: ignore[attr-defined]


def _train(config: RunConfig, poison: Callable[[Trainer], None] | None, at_steps: tuple[int, ...]) -> dict[str, Any]:
    """Trains; the first time before each of the given steps rank 1 alone is poisoned for one step."""
    place = initialize_topology(config.parallel)
    left = set(at_steps)

    def after_step(step: int) -> None:
        for handle in getattr(trainer, "handles", []):
            handle.remove()
        if poison and place.rank == 1 and step + 1 in left:
            left.remove(step + 1)
            poison(trainer)

    requests = Requests(config.directory, StopSignals(), None, 0.0, watches_files=place.rank == 0)
    trainer = Trainer(config, place, requests, after_step)
    try:
        ending = trainer.run().ending.name
    except ConfigurationError as error:
        ending = str(error)
    return {"ending": ending, **vars(trainer.progress)}


def weights(config: RunConfig, step: int) -> dict[str, torch.Tensor]:
    with FragmentReader(CheckpointStore(config.directory / "checkpoints").at_step(step).path) as reader:
        return {name: reader.read_full(name, "weight") for name in reader.names("weight")}


@pytest.mark.slow
@pytest.mark.parametrize("poison", [poison_loss, poison_gradient])
@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_a_non_finite_step_of_one_rank_is_skipped_by_all(
    tmp_path: Path, shards: Path, poison: Callable[[Trainer], None], zero_stage: int
) -> None:
    config = small_run(tmp_path, shards, parallel={"zero_stage": zero_stage}, checkpoint={"every": 1, "keep_last": 20})
    ranks = run_processes(2, _train, config, poison, (5, 9))
    for progress in ranks:
        assert progress["ending"] == "COMPLETE"
        assert (progress["step"], progress["optimizer_steps"], progress["skipped_steps"]) == (14, 12, 2)
    before, after, later = (weights(config, step) for step in (4, 5, 6))
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert any(not torch.equal(later[name], after[name]) for name in before)
    assert all(bool(value.isfinite().all()) for value in weights(config, 14).values())


def test_too_many_skipped_steps_end_the_run_with_advice(tmp_path: Path, shards: Path) -> None:
    config = small_run(tmp_path, shards, stability={"max_skipped_steps": 3})
    for progress in run_processes(2, _train, config, poison_loss, tuple(range(4, 12))):
        assert "3 steps in a row up to step 6 were skipped, the last because the loss is nan" in progress["ending"]
        assert "lower optimizer.learning_rate" in progress["ending"]


def test_verdicts() -> None:
    def judged(policy: str, loss: float) -> tuple[Verdict, str | None]:
        config = StabilityConfig(spike_deviations=4.0, spike_window=10, spike_policy=policy)  # type: ignore[arg-type]
        watch = LossWatch(config)
        for step in range(10):
            assert watch.judge(MeanLoss(2.0 + 0.01 * (step % 2), (), 5)) == (Verdict.APPLY, None)
        return watch.judge(MeanLoss(loss, (), 5))

    assert judged("skip", 2.02) == (Verdict.APPLY, None)
    assert judged("warn", 3.0)[0] is Verdict.APPLY
    assert "the loss 3.0000 is above 2.02" in str(judged("warn", 3.0)[1])
    assert judged("skip", 3.0)[0] is Verdict.SKIP
    assert judged("roll_back", 3.0)[0] is Verdict.ROLL_BACK
    assert judged("warn", math.inf)[0] is Verdict.SKIP
    assert LossWatch(StabilityConfig()).judge(MeanLoss(math.nan, (), 0)) == (Verdict.APPLY, None)


def test_a_resumed_run_measures_spikes_as_one_that_was_never_stopped() -> None:
    config = StabilityConfig(spike_deviations=4.0, spike_window=10, spike_policy="skip")
    before, after = LossWatch(config), LossWatch(config)
    for step in range(10):
        before.judge(MeanLoss(2.0 + 0.01 * (step % 2), (), 5))
    after.restore(before.recent_losses)
    assert after.judge(MeanLoss(3.0, (), 5))[0] is Verdict.SKIP
    assert LossWatch(StabilityConfig()).recent_losses == ()


def test_roll_backs_are_capped_until_a_checkpoint_lies_past_the_spike() -> None:
    watch = LossWatch(StabilityConfig())
    for _ in range(MAX_ROLL_BACKS):
        watch.rolled_back(15, "it jumped")
        watch.saved(12)  # where it rolled back to
    with pytest.raises(ConfigurationError, match=r"rolled back 3 times .* at step 15 again it jumped"):
        watch.rolled_back(15, "it jumped")
    watch.saved(16)
    watch.rolled_back(18, "it jumped")


def multiply_loss(trainer: Trainer) -> None:
    hook = trainer.engine.stage.register_forward_hook(lambda module, inputs, output: output * 50)
    trainer.handles = [hook]  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_spike_rolls_back_and_leaves_its_batch_out(tmp_path: Path, shards: Path) -> None:
    stability = {"spike_deviations": 6.0, "spike_window": 10, "spike_policy": "roll_back"}
    train = {"steps": 16, "global_batch_size": 4}
    config = small_run(tmp_path, shards, stability=stability, train=train, checkpoint={"every": 4})
    for progress in run_processes(2, _train, config, multiply_loss, (15,)):
        assert progress["ending"] == "COMPLETE"
        assert progress["left_out"] == (14 * 4,)
        assert (progress["step"], progress["optimizer_steps"]) == (16, 16)
        assert progress["consumed_sequences"] == 17 * 4


def _train_until_asked(config: RunConfig, file: str) -> dict[str, Any]:
    place = initialize_topology(config.parallel)

    def after_step(step: int) -> None:
        if place.rank == 0 and step == 4:
            (config.directory / file).touch()

    requests = Requests(config.directory, StopSignals(), None, 0.0, watches_files=place.rank == 0)
    outcome = Trainer(config, place, requests, after_step).run()
    return {"ending": outcome.ending.name, "step": outcome.step}


@pytest.mark.parametrize(("file", "ending"), [("stop", ("ENDED", 5)), ("save", ("COMPLETE", 14))])
def test_files_ask_for_a_checkpoint_or_the_end(
    tmp_path: Path, shards: Path, file: str, ending: tuple[str, int]
) -> None:
    config = small_run(tmp_path, shards, checkpoint={"every": 100, "keep_last": 9, "asynchronous": file == "save"})
    for result in run_processes(2, _train_until_asked, config, file):
        assert (result["ending"], result["step"]) == ending
    assert 5 in CheckpointStore(config.directory / "checkpoints").complete_steps()
    assert not (config.directory / file).exists()


def test_the_end_of_the_job_is_a_request(tmp_path: Path) -> None:
    signals = StopSignals()
    try:
        late = Requests(tmp_path, signals, time.time() + 60, margin=90, watches_files=True)
        early = Requests(tmp_path, signals, time.time() + 60, margin=30, watches_files=True)
        assert (late.pending(), early.pending()) == (Request.STOP, Request.NONE)
        assert late.reason(Request.STOP) == "the job's time limit"
        os.kill(os.getpid(), 10)
        assert early.pending() is Request.STOP
        assert early.reason(Request.STOP) == "SIGUSR1"
    finally:
        signals.restore()


def test_a_hang_ends_with_the_stack_of_every_thread() -> None:
    code = (
        "import time\nfrom train.hang_guard import HangGuard\n"
        "def stuck():\n    time.sleep(60)\n"
        "HangGuard(0.5, lambda: print('explained', flush=True))\nstuck()"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert result.returncode == 1
    assert result.stdout == "explained\n"
    assert result.stderr.count("in stuck") == 2


def _train_and_hang(config: RunConfig, logs: Path) -> None:
    place = initialize_topology(config.parallel)
    log = os.open(logs / f"rank_{place.rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = sys.stderr = open(log, "w", buffering=1)  # noqa: SIM115

    def sleeping_forever(step: int) -> None:
        if place.rank == 1 and step == 4:
            time.sleep(3600)

    requests = Requests(config.directory, StopSignals(), None, 0.0, watches_files=place.rank == 0)
    Trainer(config, place, requests, sleeping_forever).run()


def test_a_rank_that_sleeps_forever_ends_the_run_with_the_stacks_of_all(tmp_path: Path, shards: Path) -> None:
    config = small_run(tmp_path, shards, stability={"hang_timeout_seconds": 10.0})
    started = time.monotonic()
    run_processes(2, _train_and_hang, config, tmp_path, may_die=True)
    assert time.monotonic() - started < 300  # a hang as such would last half an hour
    waiting, sleeping = ((tmp_path / f"rank_{rank}.log").read_text() for rank in (0, 1))
    for rank, log in enumerate((waiting, sleeping)):
        assert f"hang: rank {rank}: no progress for 10 s (stability.hang_timeout_seconds) after step" in log
        assert "(most recent call first)" in log
    assert "in sleeping_forever" in sleeping
    assert "in all_reduce" in waiting
    assert read_attempts(config.directory)[-1].reason == (
        "no progress for 10 s (stability.hang_timeout_seconds) after step 4"
    )
