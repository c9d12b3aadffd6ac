"""Bad nodes are found and named before a run starts: on a real cluster, and by the facts that nodes report."""

from dataclasses import replace
from pathlib import Path

import pytest

from slurm.node_facts import BYTES_PER_PARAMETER, NodeFacts, find_mark, leave_mark, problems, skew, software
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import ROOT, Job, python_that, shrunken, submit, wait_until
from tests.train.small_run import prepare_small_corpus

GOOD = NodeFacts("node1", {"train/step.py": "a", "package torch": "2"}, gpus=8, free_bytes=10**12)
CHANGED = "train/schedule.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("preflight")


@pytest.fixture(scope="module")
def overrides(folder: Path) -> list[str]:
    return shrunken(folder / "runs", prepare_small_corpus(folder))


def verdict(job: Job) -> str:
    """The one error of a job whose nodes are bad: it ended once, with status 3."""
    assert job.end(60.0) == "FAILED", job.log
    assert job.cluster.details(job.number)["ExitCode"] == "3:0", job.log
    assert job.restarts == 0
    errors = [line for line in job.log.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, job.log
    return errors[0]


@pytest.mark.slow
def test_other_code_on_a_node(cluster: Cluster, folder: Path, overrides: list[str]) -> None:
    changed = folder / "changed.py"
    changed.write_text((ROOT / CHANGED).read_text() + "\n")
    cluster.mount_on(2, "--bind", changed, ROOT / CHANGED)
    try:
        error = verdict(submit(cluster, folder, overrides, name="code"))
    finally:
        cluster.unmount_on(2, ROOT / CHANGED)
    assert error == f"error: preflight: node node2 has another {CHANGED} than node node1; update its code and packages"


@pytest.mark.whole
def test_a_run_folder_that_is_not_shared(cluster: Cluster, folder: Path, overrides: list[str]) -> None:
    run = folder / "runs" / "not_shared"
    run.mkdir(parents=True)
    cluster.mount_on(2, "-t", "tmpfs", "tmpfs", run)
    try:
        error = verdict(submit(cluster, folder, overrides, name="not_shared"))
    finally:
        cluster.unmount_on(2, run)
    assert f"node node2 does not see in {run} what the first node wrote there" in error


@pytest.mark.slow
def test_a_node_that_never_answers(cluster: Cluster, folder: Path, overrides: list[str]) -> None:
    """It may be gone, so the job is put back into the queue."""
    silent = python_that(folder, "slurm.preflight", "[[ $(hostname) != node2 ]] || sleep 600")
    job = submit(cluster, folder, overrides, name="silent", SITE_VENV=silent, SITE_PREFLIGHT="40")
    try:
        wait_until(lambda: "put back into the queue" in job.log, 180.0, lambda: job.log)
        assert "error: preflight: node node2 did not answer within 40 s\n" in job.log
        assert "node1 did not" not in job.log
    finally:
        cluster.run("scancel", job.number)
    job.end()


@pytest.mark.whole
def test_a_run_folder_that_a_node_cannot_write(cluster: Cluster, folder: Path, overrides: list[str]) -> None:
    run = folder / "runs" / "read_only"
    run.mkdir(parents=True)
    cluster.mount_on(2, "--bind", run, run)
    cluster.mount_on(2, "-o", "remount,bind,ro", run)
    try:
        error = verdict(submit(cluster, folder, overrides, name="read_only"))
    finally:
        cluster.unmount_on(2, run)
    assert error == f"error: preflight: node node2 cannot write in {run}: Read-only file system"


@pytest.mark.whole
def test_gpus_that_torch_does_not_see(cluster: Cluster, folder: Path, overrides: list[str]) -> None:
    """The cluster's GPUs are no more than names."""
    error = verdict(submit(cluster, folder, overrides, "--gpus-per-node=2", name="gpus"))
    assert "node node1 shows 0 of the 2 GPUs of this job to torch; node node2 shows 0 of" in error


@pytest.mark.whole
def test_a_slow_network(cluster: Cluster, folder: Path, overrides: list[str]) -> None:
    error = verdict(submit(cluster, folder, overrides, name="slow", SITE_MIN_ALLREDUCE_GBPS="100000"))
    assert "node node2 is reached with " in error
    assert "less than SITE_MIN_ALLREDUCE_GBPS=100000" in error


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"gpus": 7}, "node bad shows 7 of the 8 GPUs of this job to torch"),
        (
            {"free_bytes": 23 * BYTES_PER_PARAMETER},
            "node bad has 0.0 GB free in the run's folder, two checkpoints need",
        ),
        (
            {"software": {**GOOD.software, "package torch": "1"}},
            "node bad has another package torch (1) than node node1",
        ),
        ({"software": {"package torch": "2"}}, "node bad has another train/step.py than node node1"),
        ({"problem": "cannot write in X"}, "node bad cannot write in X"),
    ],
)
def test_problems_are_of_the_odd_one_out(changes: dict[str, object], problem: str | None) -> None:
    bad = replace(GOOD, node="bad", **changes)  # type: ignore[arg-type]
    found = problems([bad, GOOD, replace(GOOD, node="node2")], expected_gpus=8, parameters=12)
    assert len(found) == (problem is not None)
    assert problem is None or found[0].startswith(problem)


def test_software_has_code_configurations_and_packages() -> None:
    found = software()
    assert {"slurm/preflight.py", "train/trainer.py", "configs/quickstart.yaml", "package torch", "Python"} <= set(
        found
    )
    assert not any(name.startswith(("tests/", "runs/")) for name in found)


def test_marks(tmp_path: Path) -> None:
    assert leave_mark(tmp_path, "mark", "token") is None
    assert find_mark(tmp_path, "mark", "token") is None
    missing = leave_mark(tmp_path / "none", "mark", "token")
    assert missing == f"cannot write in {tmp_path / 'none'}: No such file or directory"


@pytest.mark.parametrize(("there", "off"), [(105.0, 0.0), (98.0, 2.0), (112.5, 2.5)])
def test_skew_is_only_what_is_certain(there: float, off: float) -> None:
    assert skew(sent=100.0, there=there, received=110.0) == off
