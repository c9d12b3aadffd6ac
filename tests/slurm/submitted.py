"""A run that was submitted to the tests' cluster from Python: how it is watched and compared."""

import json
import time
from pathlib import Path

import submitit
import torch

from tests.slurm.cluster import Cluster
from tests.train.test_resume import final_tensors, scalars
from train.config import RunConfig
from train.process import RankResult


class Submitted:
    """A run in Slurm."""

    def __init__(self, cluster: Cluster, config: RunConfig) -> None:
        self.cluster, self.config = cluster, config
        record = json.loads((config.directory / "submission.json").read_text())
        self.job, self.logs = record["job"], Path(record["logs"])

    @property
    def log(self) -> str:
        """What rank 0 and the batch script have said so far."""
        path = self.logs / f"{self.job}_0_log.out"
        return path.read_text() if path.exists() else ""

    @property
    def restarts(self) -> int:
        return int(self.cluster.details(self.job)["Restarts"])

    def wait_until_said(self, text: str, seconds: float = 180.0) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.log:
            assert time.monotonic() < deadline, f"no {text!r} in\n{self.log}"
            time.sleep(0.05)

    def results(self) -> list[RankResult]:
        """What the processes returned."""
        job: submitit.SlurmJob[RankResult] = submitit.SlurmJob(
            self.logs, self.job, range(self.config.parallel.world_size)
        )
        return job.results()

    def assert_like(self, undisturbed: RunConfig) -> None:
        """Complete, with the same losses and the same weights and moments, bit for bit."""
        assert self.cluster.wait_for(self.job, seconds=300.0) == "COMPLETED", self.log
        assert [result.status for result in self.results()] == [0] * self.config.parallel.world_size
        for tag in ("train/loss", "validation/loss"):
            assert scalars(self.config, tag) == scalars(undisturbed, tag)
        assert len(scalars(self.config, "train/loss")) == self.config.train.steps
        expected, actual = final_tensors(undisturbed), final_tensors(self.config)
        assert expected.keys() == actual.keys()
        for key, tensor in expected.items():
            assert torch.equal(actual[key], tensor), key
