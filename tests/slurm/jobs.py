"""Shrunken jobs for the tests' cluster: how they are submitted, watched, disturbed and compared."""

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from checkpoints.store import CheckpointStore
from tests.slurm.cluster import Cluster
from tests.train.small_run import VOCABULARY
from tests.train.test_resume import final_tensors, run, scalars
from train.config import RunConfig
from train.config_file import load_config

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs/paper/block_main_b4_1.2b.yaml"
SCRIPT = ROOT / "slurm" / "pretrain_block_1b.sh"
STACK = "{num_layers: 1, hidden_size: 32, num_attention_heads: 4}"
TWO_BY_TWO = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1")
POLL_SECONDS = 0.05


def shrunken(root: Path, shards: Path, steps: int = 100, every: int = 20) -> list[str]:
    """Overrides that make the paper's run one of seconds on four CPU processes."""
    return [
        f"run.root={root}",
        f"model.vocab_size={VOCABULARY}",
        "model.sequence_length=64",
        f"model.block_decoder={STACK}",
        f"model.token_decoder={STACK}",
        f"data.path={shards}",
        f"train.steps={steps}",
        "train.global_batch_size=8",
        "train.micro_batch_size=1",
        "train.precision=fp32",
        "train.cpu_threads=1",
        "optimizer.warmup_steps=1",
        "optimizer.learning_rate=0.01",
        "validation.sequences=4",
        f"checkpoint.every={every}",
        "logging.every=1",
    ]


class Job:
    """A job of the cluster and what it writes.

    Args:
        cluster: where it runs.
        number: Slurm's id.
        log: the job's own log.
        name: of its run.
        overrides: of its configuration.
    """

    def __init__(self, cluster: Cluster, number: str, log: Path, name: str, overrides: list[str]) -> None:
        self.cluster, self.number = cluster, number
        self._log, self._name, self._overrides = log, name, overrides

    @property
    def config(self) -> RunConfig:
        """Its run, as the four processes have it."""
        return run_config(self._overrides, self._name)

    @property
    def log(self) -> str:
        """What the job's own log says so far."""
        return self._log.read_text() if self._log.exists() else ""

    @property
    def restarts(self) -> int:
        """How often it was put back into the queue."""
        return int(self.cluster.details(self.number)["Restarts"])

    def end(self, seconds: float = 180.0) -> str:
        """Waits for the end; returns Slurm's word for it."""
        return self.cluster.wait_for(self.number, seconds=seconds)

    def wait_for_checkpoint(self, step: int, seconds: float = 120.0) -> None:
        """Waits until the checkpoint of a step is published."""
        path = self.config.directory / "checkpoints" / f"step_{step:08d}"
        wait_until(path.exists, seconds, lambda: f"no {path}\n{self.log}")

    def kill_rank(self, rank: int) -> None:
        """SIGKILL for one process of the training."""
        wanted = {f"SLURM_JOB_ID={self.number}", f"SLURM_PROCID={rank}", "SLURM_STEP_NODELIST="}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if "--launcher" not in (path / "cmdline").read_text().split("\0"):
                    continue
                environment = (path / "environ").read_text().split("\0")
            except OSError:
                continue
            if all(any(entry.startswith(want) for entry in environment) for want in wanted):
                os.kill(int(path.name), signal.SIGKILL)
                return
        raise AssertionError(f"rank {rank} of job {self.number} does not run")


def wait_until(condition: Callable[[], bool], seconds: float, complaint: Callable[[], str]) -> None:
    """Waits for a condition; fails with the complaint if it does not come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, complaint()
        time.sleep(POLL_SECONDS)


def submit(
    cluster: Cluster,
    folder: Path,
    overrides: list[str],
    *options: str,
    name: str = "small",
    script: Path = SCRIPT,
    **environment: str,
) -> Job:
    """Submits a job script to two nodes for two tasks on each."""
    log = folder / f"{name}-{time.monotonic_ns()}.log"
    values = {"RUN_NAME": name, "SITE_VENV": sys.prefix, "OMP_NUM_THREADS": "1", **environment}
    command = ("sbatch", "--parsable", f"--output={log}", *TWO_BY_TWO, *options, script.relative_to(ROOT), *overrides)
    number = cluster.run(*command, cwd=ROOT, **values).stdout.strip()
    return Job(cluster, number, log, name, overrides)


def python_that(folder: Path, part: str, behaviour: str) -> str:
    """An environment whose Python does something else when a part of its command line is this one."""
    program = Path(tempfile.mkdtemp(prefix="environment-", dir=folder)) / "bin" / "python"
    program.parent.mkdir()
    program.write_text(f'#!/bin/bash\n[[ "$*" != *{part}* ]] || {behaviour}\nexec {sys.executable} "$@"\n')
    program.chmod(0o755)
    return str(program.parent.parent)


def run_config(overrides: list[str], name: str) -> RunConfig:
    """The configuration that the job's four processes have."""
    return load_config(CONFIG, [*overrides, f"run.name={name}", "parallel.data=4"])


def undisturbed(overrides: list[str], name: str = "undisturbed") -> RunConfig:
    """Makes the run once without Slurm and without disturbance."""
    config = run_config(overrides, name)
    run(config)
    return config


def assert_same_run(actual: RunConfig, expected: RunConfig) -> None:
    """The same losses at the same steps, the same samples consumed, and the same final tensors, bit for bit."""
    newest = [CheckpointStore(config.directory / "checkpoints").newest() for config in (actual, expected)]
    progress = [checkpoint.metadata["progress"] for checkpoint in newest if checkpoint]
    assert progress[0] == progress[1]
    assert progress[0]["consumed_sequences"] == expected.train.steps * expected.train.global_batch_size
    assert scalars(actual, "train/loss") == scalars(expected, "train/loss")
    tensors = final_tensors(actual)
    for key, tensor in final_tensors(expected).items():
        assert torch.equal(tensors[key], tensor), key
