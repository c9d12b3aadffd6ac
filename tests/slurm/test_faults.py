"""Jobs of slurm/pretrain_block_1b.sh on a real cluster end like an undisturbed run, whatever happens to them."""

from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import assert_same_run, shrunken, submit, undisturbed, wait_until
from tests.train.small_run import prepare_small_corpus
from train.attempts import read_attempts
from train.config import RunConfig

STEPS, EVERY, DISTURBED = 100, 20, 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def overrides(folder: Path) -> list[str]:
    return shrunken(folder / "runs", prepare_small_corpus(folder), STEPS, EVERY)


@pytest.fixture(scope="module")
def expected(overrides: list[str]) -> RunConfig:
    return undisturbed(overrides)


@pytest.mark.slow
def test_a_killed_rank(cluster: Cluster, folder: Path, overrides: list[str], expected: RunConfig) -> None:
    job = submit(cluster, folder, overrides, name="killed_rank")
    job.wait_for_checkpoint(DISTURBED)
    job.kill_rank(3)
    assert job.end() == "COMPLETED", job.log
    assert job.restarts == 1
    assert "requeue: put back into the queue: it " in job.log
    assert "complete at step 100" in job.log
    assert "preflight: 2 nodes alike" in job.log
    logs = {path.name for path in (job.config.directory / "slurm").iterdir()}
    assert logs == {f"{job.number}-{attempt}-node{node}.log" for attempt in (0, 1) for node in (1, 2)}
    assert_same_run(job.config, expected)


@pytest.mark.whole
def test_requeued_by_hand(cluster: Cluster, folder: Path, overrides: list[str], expected: RunConfig) -> None:
    job = submit(cluster, folder, overrides, name="requeued")
    job.wait_for_checkpoint(DISTURBED)
    cluster.run("scontrol", "requeue", job.number)
    assert job.end() == "COMPLETED", job.log
    assert job.restarts == 1
    assert_same_run(job.config, expected)


@pytest.mark.whole
def test_a_node_powered_off(cluster: Cluster, folder: Path, overrides: list[str], expected: RunConfig) -> None:
    job = submit(cluster, folder, overrides, name="powered_off")
    job.wait_for_checkpoint(DISTURBED)
    cluster.power_off(2)
    wait_until(lambda: job.restarts > 0, 60.0, lambda: job.log)
    cluster.power_on(2)
    assert job.end() == "COMPLETED", job.log
    cluster.wait_for_nodes(2)
    assert_same_run(job.config, expected)


@pytest.mark.whole
def test_the_first_node_powered_off(cluster: Cluster, folder: Path, overrides: list[str], expected: RunConfig) -> None:
    """It takes the batch script with it."""
    job = submit(cluster, folder, overrides, name="first_powered_off")
    job.wait_for_checkpoint(DISTURBED)
    cluster.power_off(1)
    wait_until(lambda: job.restarts > 0, 60.0, lambda: job.log)
    cluster.power_on(1)
    assert job.end() == "COMPLETED", job.log
    cluster.wait_for_nodes(2)
    assert_same_run(job.config, expected)


@pytest.mark.whole
def test_a_time_limit(cluster: Cluster, folder: Path) -> None:
    """Two minutes, of which Slurm's warning leaves about one."""
    overrides = shrunken(folder / "runs", folder / "shards", steps=1000, every=250)
    overrides.append("stability.stop_before_end_seconds=0")
    job = submit(cluster, folder, overrides, "--time=2", "--signal=TERM@45", name="limited")
    assert job.end(900.0) == "COMPLETED", job.log
    assert job.restarts > 0
    assert "put back into the queue: it was stopped at step" in job.log
    assert_same_run(job.config, undisturbed(overrides, "not_limited"))


@pytest.mark.whole
def test_two_jobs_of_one_run(cluster: Cluster, folder: Path, overrides: list[str]) -> None:
    """One is refused and stays away; the other is not disturbed."""
    jobs = [submit(cluster, folder, [*overrides, "train.steps=10000"], name="twice") for _ in range(2)]
    wait_until(lambda: "FAILED" in [job.cluster.state(job.number) for job in jobs], 180.0, lambda: jobs[0].log)
    refused, writer = sorted(jobs, key=lambda job: job.cluster.state(job.number))
    errors = [line for line in refused.log.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "run twice is being written by another job" in errors[0]
    assert (refused.restarts, writer.restarts) == (0, 0)
    assert len(read_attempts(writer.config.directory)) == 1
    (writer.config.directory / "stop").touch()
    assert writer.end() == "COMPLETED", writer.log
