"""Runs submitted to a real cluster from Python end like undisturbed ones, whatever happens to their jobs."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import submitit

import tools.pretrain
import tools.status
from data.errors import DataError
from parallel.errors import ConfigurationError
from slurm.site import SiteSettings
from slurm.submission import Shape, shape_of
from slurm.training_job import TrainingJob
from tests.slurm.cluster import Cluster
from tests.slurm.submitted import Submitted
from tests.train.small_run import prepare_small_corpus, small_run
from tests.train.test_resume import run, scalars
from train.config import RunConfig
from train.config_file import config_text, load_config

ROOT = Path(__file__).resolve().parents[2]
STEPS, DISTURBED = 100, 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("submission")


@pytest.fixture(scope="module")
def config_file(folder: Path) -> Path:
    """A run on two nodes, with one process on each."""
    config = small_run(
        folder / "runs",
        prepare_small_corpus(folder),
        train={"steps": STEPS, "cpu_threads": 1},
        validation={"every": 40},
        checkpoint={"every": 30},
    )
    path = folder / "run.yaml"
    path.write_text(config_text(config))
    return path


@pytest.fixture(scope="module")
def undisturbed(config_file: Path) -> RunConfig:
    config = load_config(config_file, ["run.name=undisturbed"])
    run(config)
    return config


def command(tool: str, *arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / f"{tool}.py"), *map(str, arguments)]


def pretrain(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The tool in this process, which has imported everything already."""
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *map(str, arguments), "--launcher", "slurm"])
    return tools.pretrain.main()


def status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *folders: object) -> str:
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["status.py", *map(str, folders)])
    tools.status.main()
    return capsys.readouterr().out


@pytest.mark.slow
def test_a_preempted_run_is_put_back_once_and_ends_like_an_undisturbed_one(
    on_cluster: Cluster,
    config_file: Path,
    undisturbed: RunConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = load_config(config_file, ["run.name=preempted"])
    waiting = subprocess.Popen(
        command("pretrain", config_file, "run.name=preempted", "--launcher", "slurm", "--wait"),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert waiting.stdout is not None
    announced = waiting.stdout.readline()
    submitted = Submitted(on_cluster, config)
    assert announced.startswith(f"submitted run preempted as job {submitted.job}; log: {submitted.logs}")
    submitted.wait_until_said(f"step {DISTURBED}/")
    shown = status(monkeypatch, capsys, config.directory)
    step = re.match(r"preempted: running\n  step (\d+) of 100", shown)
    assert step is not None, shown
    assert DISTURBED <= int(step[1]) < STEPS
    assert f"job {submitted.job} in Slurm: RUNNING on node[1-2]" in shown
    on_cluster.run("scancel", "--signal=USR2", submitted.job)
    printed = waiting.communicate(timeout=300)[0]
    assert waiting.returncode == 0
    assert "requeue: put back into the queue: it was stopped at step" in printed
    # Rank 0 may learn of it from the other rank before Slurm has brought it the signal.
    assert re.search("attempt 2; the one before: stopped: (SIGUSR2|another rank was asked to)\n", printed), printed
    assert f"run preempted: complete at step {STEPS}" in printed
    submitted.assert_like(undisturbed)
    assert submitted.restarts == 1
    assert len((config.directory / "requeues.jsonl").read_text().splitlines()) == 1
    shown = status(monkeypatch, capsys, config.directory.parent)
    assert shown.count(": complete\n  step 100") == 2
    assert f"job {submitted.job} in Slurm: COMPLETED on node[1-2], restarts: 1" in shown
    assert "attempt 2 on node1" in shown


def test_a_run_that_waits_in_the_queue(
    on_cluster: Cluster, config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told by tools/status.py, refused a second time, and its points are those of an array."""
    config = load_config(config_file, ["run.name=waiting"])
    sweep = config_file.with_name("waiting_points.yaml")
    sweep.write_text("- {run.name: point_a}\n- {run.name: point_b, optimizer.learning_rate: 1.0e-3}\n")
    with on_cluster.starting_nothing():
        assert pretrain(monkeypatch, config_file, "run.name=waiting") == 0
        job = Submitted(on_cluster, config).job
        assert status(monkeypatch, capsys, config.directory) == (
            f"waiting: not started\n  job {job} in Slurm: PENDING (PartitionDown)\n"
        )
        with pytest.raises(ConfigurationError, match=f"run waiting is in Slurm already, as job {job} .PENDING"):
            pretrain(monkeypatch, config_file, "run.name=waiting")
        assert pretrain(monkeypatch, config_file, "--sweep", sweep, "--at-once", 1) == 0
        points = [Submitted(on_cluster, load_config(config_file, [f"run.name=point_{name}"])) for name in "ab"]
        array = points[0].job.partition("_")[0]
        assert [point.job for point in points] == [f"{array}_0", f"{array}_1"]
        details = on_cluster.details(array)
        assert (details["ArrayTaskId"], details["JobName"]) == ("0-1%1", "waiting_points")
        with pytest.raises(ConfigurationError, match=f"run point_b is in Slurm already, as job {array}_1 .PENDING"):
            pretrain(monkeypatch, config_file, "run.name=point_b")
        for submitted, rate in zip(points, (1e-2, 1e-3), strict=True):
            pickled = submitit.SlurmJob(submitted.logs, submitted.job).submission().function
            assert isinstance(pickled, TrainingJob)
            assert pickled.config.optimizer.learning_rate == rate
            assert pickled.checkpoint().function == pickled


def test_what_cannot_be_submitted_leaves_nothing_behind(
    on_cluster: Cluster, config_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mistakes: list[tuple[dict[str, str], tuple[str, ...], str]] = [
        ({"SITE_PARTITION": "nowhere"}, (), "Slurm refused the job: invalid partition specified: nowhere"),
        ({"SITE_NODES": "3"}, ("parallel.data=4",), "4 processes do not spread evenly with SITE_NODES=3"),
        ({"SITE_TIME": "5"}, (), "SITE_TIME=5 leaves no time to train"),
        ({"SITE_VENV": str(tmp_path)}, (), "holds no Python environment"),
        ({"PATH": str(tmp_path)}, (), "needs sbatch, which is not on PATH"),
        ({}, ("data.path=nowhere",), "tools/prepare_data.py"),
        ({}, ("run.root=/proc/runs",), "change run.root"),
    ]
    for variables, overrides, message in mistakes:
        with monkeypatch.context() as changed:
            for name, value in variables.items():
                changed.setenv(name, value)
            with pytest.raises((ConfigurationError, DataError), match=message):
                pretrain(changed, config_file, f"run.root={tmp_path}/deep/runs", *overrides)
        assert list(tmp_path.iterdir()) == []
    assert on_cluster.run("squeue", "--noheader").stdout == ""


@pytest.mark.parametrize(
    ("site", "processes", "expected"),
    [
        ({}, 4, Shape(1, 4, False)),
        ({"nodes": 2}, 4, Shape(2, 2, False)),
        ({"gpus_per_node": 8, "nodes": 3}, 16, Shape(2, 8, True)),
        ({"gpus_per_node": 8}, 4, Shape(1, 4, True)),
        ({"gpus_per_node": 8, "tasks_per_node": 4}, 16, Shape(4, 4, True)),
        ({"gpus_per_node": 8}, 12, "12 processes do not spread evenly with SITE_GPUS_PER_NODE=8"),
        ({"gpus_per_node": 4, "tasks_per_node": 8}, 16, "SITE_TASKS_PER_NODE=8 is more than SITE_GPUS_PER_NODE=4"),
    ],
)
def test_how_processes_spread_over_nodes(
    tmp_path: Path, site: dict[str, int], processes: int, expected: Shape | str
) -> None:
    batch = {"global_batch_size": 48}
    config = small_run(tmp_path, tmp_path, parallel={"data": processes, "zero_stage": 0}, train=batch)
    if isinstance(expected, Shape):
        assert shape_of(config, SiteSettings.model_validate(site)) == expected
        return
    with pytest.raises(ConfigurationError, match=expected):
        shape_of(config, SiteSettings.model_validate(site))


def kill_rank(cluster: Cluster, submitted: Submitted) -> None:
    wanted = {f"SLURM_JOB_ID={submitted.job}", "SLURM_PROCID=1", "SUBMITIT_EXECUTOR=slurm"}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            environment = set((path / "environ").read_text().split("\0"))
            program = (path / "cmdline").read_text().split("\0")[0]
        except OSError:
            continue
        if wanted <= environment and program == sys.executable:
            os.kill(int(path.name), signal.SIGKILL)
            return
    raise AssertionError("rank 1 does not run")


def switch_off(cluster: Cluster, submitted: Submitted, node: int) -> None:
    cluster.power_off(node)
    deadline = time.monotonic() + 60.0
    while not submitted.restarts:
        assert time.monotonic() < deadline, submitted.log
        time.sleep(0.2)
    cluster.power_on(node)


@pytest.mark.whole
@pytest.mark.parametrize(
    "disturb",
    [
        pytest.param(lambda cluster, job: cluster.run("scontrol", "requeue", job.job), id="scontrol requeue"),
        pytest.param(kill_rank, id="a killed rank"),
        pytest.param(lambda cluster, job: switch_off(cluster, job, 2), id="another node off"),
        pytest.param(lambda cluster, job: switch_off(cluster, job, 1), id="the first node off"),
    ],
)
def test_a_disturbed_run_ends_like_an_undisturbed_one(
    on_cluster: Cluster,
    config_file: Path,
    undisturbed: RunConfig,
    disturb: Callable[[Cluster, Submitted], object],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    name = request.node.callspec.id.replace(" ", "_")
    assert pretrain(monkeypatch, config_file, f"run.name={name}") == 0
    submitted = Submitted(on_cluster, load_config(config_file, [f"run.name={name}"]))
    submitted.wait_until_said(f"step {DISTURBED}/")
    disturb(on_cluster, submitted)
    submitted.assert_like(undisturbed)
    assert submitted.restarts == 1
    on_cluster.wait_for_nodes(2)


@pytest.mark.whole
def test_a_time_limit(on_cluster: Cluster, config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An administrator shortens it under the running job; Slurm warns half a minute later, at most."""
    length = ["train.steps=2000", "checkpoint.every=500", "validation.every=500"]
    expected = load_config(config_file, [*length, "run.name=unlimited"])
    run(expected)
    assert pretrain(monkeypatch, config_file, *length, "run.name=limited") == 0
    submitted = Submitted(on_cluster, load_config(config_file, [*length, "run.name=limited"]))
    submitted.wait_until_said(f"step {DISTURBED}/")
    on_cluster.run("scontrol", "update", f"JobId={submitted.job}", "TimeLimit=3")
    submitted.wait_until_said("requeue: put back into the queue: it was stopped at step")
    on_cluster.wait_for(submitted.job, ["PENDING"])
    on_cluster.run("scontrol", "update", f"JobId={submitted.job}", "TimeLimit=60")
    submitted.assert_like(expected)
    assert submitted.restarts == 1


@pytest.mark.whole
def test_a_sweep_runs_as_an_array_whose_points_restart_by_themselves(
    on_cluster: Cluster, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = config_file.with_name("points.yaml")
    rates = {"point_0": 1e-2, "point_1": 5e-3, "point_2": 1e-3}
    sweep.write_text("".join(f"- {{run.name: {name}, optimizer.learning_rate: {rates[name]}}}\n" for name in rates))
    monkeypatch.setenv("SITE_NODES", "1")
    shared = ["parallel.data=1", "train.steps=60", "validation.every=0"]
    assert pretrain(monkeypatch, config_file, *shared, "--sweep", sweep, "--at-once", 2) == 0
    configs = [load_config(config_file, [*shared, f"run.name={name}"]) for name in rates]
    points = [Submitted(on_cluster, config) for config in configs]
    points[2].wait_until_said(f"step {DISTURBED}/")
    # The last task's own id is that of the array, so this is the one that could put all back.
    on_cluster.run("scancel", "--signal=USR2", points[2].job)
    for point in points:
        assert on_cluster.wait_for(point.job, seconds=300.0) == "COMPLETED", point.log
        assert [result.status for result in point.results()] == [0]
    assert [point.restarts for point in points] == [0, 0, 1]
    losses = [[loss for _, loss in scalars(config, "train/loss")] for config in configs]
    assert [len(values) for values in losses] == [60] * 3
    assert losses[0][0] == losses[1][0] == losses[2][0]
    assert len({values[-1] for values in losses}) == 3
