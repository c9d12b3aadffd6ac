"""What is known of jobs on a cluster that keeps no accounts."""

from pathlib import Path

import pytest
import submitit
from submitit.slurm.slurm import SlurmInfoWatcher

from slurm.job_state import FORGOTTEN, adapt_submitit, job_states
from tests.slurm.cluster import Cluster


def submit(cluster: Cluster, folder: Path, command: str, *options: str) -> str:
    output = f"--output={folder}/log"
    return cluster.run("sbatch", "--parsable", output, "--ntasks=1", *options, f"--wrap={command}").stdout.strip()


def test_states_of_jobs_and_of_the_tasks_of_arrays(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    failed = submit(cluster, tmp_path, "exit 3")
    array = submit(cluster, tmp_path, "exit $SLURM_ARRAY_TASK_ID", "--array=0-1")
    held = submit(cluster, tmp_path, "true", "--array=0,2-3%1", "--hold")
    for job in (failed, f"{array}_0", f"{array}_1"):
        cluster.wait_for(job)
    names = [failed, f"{array}_0", f"{array}_1", f"{held}_3", f"{held}_1", "99999"]
    states = list(job_states(names).values())
    assert [state and (state.state, state.exit_status, state.has_ended) for state in states] == [
        ("FAILED", 3, True),
        ("COMPLETED", 0, True),
        ("FAILED", 1, True),
        ("PENDING", 0, False),
        (FORGOTTEN, 0, True),
        (FORGOTTEN, 0, True),
    ]
    assert states[3] is not None
    assert states[3].reason == "JobHeldUser"
    cluster.run("scancel", held)
    assert SlurmInfoWatcher().get_state(failed) == "UNKNOWN", "Submitit does without sacct; the adaptation may go"
    adapt_submitit()
    assert submitit.SlurmJob(tmp_path, failed).state == "FAILED"
    assert submitit.SlurmJob(tmp_path, failed).done()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert job_states([failed]) == {failed: None}, "no answer is no end"
