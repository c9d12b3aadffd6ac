"""The job scripts on a real cluster: what they submit, and that each mistake ends in one clear error."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoints.store import CheckpointStore
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import CONFIG, ROOT, SCRIPT, TWO_BY_TWO, Job, python_that, shrunken, submit, wait_until
from tests.tools.outcomes import assert_one_clear_error
from tests.tools.vanilla_model import save_vanilla_model
from tests.train.small_run import prepare_small_corpus, small_run
from train.config_file import config_text

SCRIPTS = sorted(path for path in (ROOT / "slurm").glob("*.sh") if not path.name.startswith("_"))
# Everything that the scripts call, except Slurm's own programs.
PROGRAMS = ("bash", "env", "dirname", "basename", "sed", "tail", "git")
NOTED = '{{"time": 0.0, "job": "{job}", "status": 1, "step": 0}}\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scripts")


@pytest.fixture(scope="module")
def overrides(folder: Path) -> list[str]:
    return shrunken(folder / "runs", prepare_small_corpus(folder))


def error_of(job: Job) -> str:
    """The one error of a job that was refused: it ended once, with status 2."""
    assert job.end() == "FAILED", job.log
    assert job.cluster.details(job.number)["ExitCode"] == "2:0", job.log
    assert job.restarts == 0
    errors = [line for line in job.log.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, job.log
    return errors[0]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_slurm_accepts_the_script_as_it_is(large_cluster: Cluster, script: Path) -> None:
    assert os.access(script, os.X_OK)
    answer = large_cluster.run("sbatch", "--test-only", script.relative_to(ROOT), cwd=ROOT).stderr
    assert "to start at" in answer
    assert "--signal=TERM@300\n" in script.read_text(), "without B: the ranks get the signal, not the script"
    assert (ROOT / "runs" / ".gitkeep").exists(), "Slurm does not make the folder of a job's log"


def test_shellcheck() -> None:
    if not shutil.which("shellcheck"):
        pytest.skip("no shellcheck here")
    subprocess.run(["shellcheck", "--external-sources", *SCRIPTS, ROOT / "slurm" / "_run.sh"], cwd=ROOT, check=True)


def run_script(cluster: Cluster, *overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the script itself, as a user who submits with the site's values."""
    return cluster.run(SCRIPT, *overrides, check=False, SITE_VENV=sys.prefix, **environment)


def test_submits_itself_with_the_values_of_the_site(cluster: Cluster, folder: Path, overrides: list[str]) -> None:
    environment = {"SITE_PARTITION": "main", "SITE_NODES": "2", "SITE_GPUS_PER_NODE": "4", "SITE_TIME": "10"}
    more = {"SITE_QOS": "normal", "SITE_CPUS_PER_TASK": "1", "RUN_NAME": "mine"}
    with cluster.starting_nothing():
        result = run_script(cluster, *overrides, **environment, **more)
        assert result.returncode == 0, result.stderr
        details = cluster.details(result.stdout.split()[-1])
    assert "sbatch --partition=main --qos=normal --nodes=2 " in result.stdout
    assert (details["JobName"], details["Partition"], details["TimeLimit"]) == ("mine", "main", "00:10:00")
    assert (details["NumNodes"], details["TresPerNode"]) == ("2-2", "gres:gpu:4")
    assert details["NumTasks"] == "8"


def test_no_slurm(folder: Path) -> None:
    programs = folder / "programs"
    programs.mkdir()
    for name in PROGRAMS:
        (programs / name).symlink_to(shutil.which(name) or "")
    environment = {"PATH": str(programs), "SITE_VENV": sys.prefix}
    result = subprocess.run([SCRIPT], env=environment, capture_output=True, text=True)
    assert_one_clear_error(result, "sbatch is not on PATH", "tools/pretrain.py")


@pytest.mark.parametrize(
    ("environment", "parts"),
    [
        ({"SITE_PARTITION": "nosuch"}, ("Slurm refused the job", "nosuch", "Invalid partition name")),
        ({"SITE_NODES": "3"}, ("Slurm refused the job", "requested than permitted")),
        ({"SITE_SETUP": "nosuch"}, ("SITE_SETUP=nosuch is not a file",)),
    ],
)
def test_refused_when_submitted(
    cluster: Cluster, overrides: list[str], environment: dict[str, str], parts: tuple[str, ...]
) -> None:
    assert_one_clear_error(run_script(cluster, *overrides, **environment), *parts)


def test_site_file(folder: Path) -> None:
    """In a copy, because a checkout has only one such file; it says what it would run where there is no Slurm."""
    copy = folder / "copy"
    for name in ("slurm", "tools", "train", "parallel", "data", "checkpoints", "configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "site.conf"))
    site = copy / "slurm" / "site.conf"
    example = (ROOT / "slurm" / "site.conf.example").read_text()
    site.write_text(f"{example}\n # ours\nSITE_VENV='{sys.prefix}' # shared\nRUN_CONFIG=nosuch$(touch {folder}/ran)\n")
    environment = {"PATH": os.environ["PATH"]}
    result = subprocess.run([copy / "slurm" / SCRIPT.name], env=environment, capture_output=True, text=True)
    assert_one_clear_error(result, "nosuch$(touch")
    assert not (folder / "ran").exists(), "values are never expanded"
    overridden = {**environment, "RUN_CONFIG": str(CONFIG)}
    result = subprocess.run([copy / "slurm" / SCRIPT.name], env=overridden, capture_output=True, text=True)
    assert_one_clear_error(
        result, f"no training data in {copy}/runs/pile/shards; make it with: {sys.prefix}/bin/python"
    )
    site.write_text("SITE_PARTITON=gpu\n")
    result = subprocess.run([copy / "slurm" / SCRIPT.name], env=environment, capture_output=True, text=True)
    assert_one_clear_error(result, "slurm/site.conf: 'SITE_PARTITON=gpu' is not NAME=VALUE with a name of")


def test_mistakes_end_the_job_with_one_error(cluster: Cluster, folder: Path, overrides: list[str]) -> None:
    """All at once, because each job waits for nothing but Slurm."""
    (folder / "a_file").write_text("")
    jobs = {
        "unknown field train.step; the nearest is train.steps": submit(cluster, folder, [*overrides, "train.step=3"]),
        "4 processes cannot hold replicas of 8": submit(
            cluster, folder, [*overrides, "parallel.tensor=4", "parallel.pipeline=2"]
        ),
        "a_file/small cannot be written: Not a directory": submit(
            cluster, folder, [*overrides, f"run.root={folder}/a_file"]
        ),
        "no training data in": submit(cluster, folder, [*overrides, f"data.path={folder}/nosuch"]),
        "no Python environment in nosuch; create it with: make install": submit(
            cluster, folder, overrides, SITE_VENV="nosuch"
        ),
    }
    for message, job in jobs.items():
        assert message in error_of(job)


def test_submitted_from_elsewhere(cluster: Cluster, tmp_path: Path) -> None:
    number = cluster.run("sbatch", "--parsable", "--output=log", *TWO_BY_TWO, SCRIPT, cwd=tmp_path).stdout.strip()
    assert cluster.wait_for(number) == "FAILED"
    assert (tmp_path / "log").read_text() == f"error: {tmp_path} is not the repository; submit from its root\n"


def is_locked(path: Path) -> bool:
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_run_that_another_job_writes(cluster: Cluster, folder: Path, overrides: list[str]) -> None:
    lock = folder / "runs" / "taken" / ".lock"
    lock.parent.mkdir(parents=True)
    lock.write_text("process 7 on node1\n")
    writer = cluster.run(
        *("sbatch", "--parsable", "--output=/dev/null"), f"--wrap=flock {lock} sleep 600", cwd=folder
    ).stdout.strip()
    cluster.wait_for(writer, ["RUNNING"])
    wait_until(lambda: is_locked(lock), 60.0, lambda: "nobody holds the lock")
    refused = submit(cluster, folder, overrides, name="taken")
    assert "run taken is being written by another job (process 7 on node1)" in error_of(refused)
    cluster.run("scancel", writer)


def test_values_that_sbatch_does_not_read(cluster: Cluster, folder: Path, overrides: list[str]) -> None:
    job = submit(cluster, folder, [*overrides, "train.step=3"], SITE_PARTITION="gpu", SITE_NODES="2")
    error_of(job)
    warnings = [line for line in job.log.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert "without SITE_PARTITION=gpu (it has main): sbatch does not read slurm/site.conf" in warnings[0]


def test_restarts_without_progress_end(cluster: Cluster, folder: Path, overrides: list[str]) -> None:
    run = folder / "runs" / "stuck"
    run.mkdir(parents=True)
    broken = python_that(folder, "--launcher", "exit 9")
    job = submit(cluster, folder, overrides, "--hold", name="stuck", SITE_VENV=broken, SITE_PREFLIGHT="0")
    (run / "requeues.jsonl").write_text(NOTED.format(job=job.number) * 3)
    cluster.run("scontrol", "release", job.number)
    assert job.end() == "FAILED", job.log
    assert job.restarts == 0
    assert "3 restarts in a row made no checkpoint after step 0, and the last ended with status 9" in job.log


def test_a_cancelled_job_stays_cancelled(cluster: Cluster, folder: Path, overrides: list[str]) -> None:
    waiting = python_that(folder, "--launcher", "sleep 600")
    job = submit(cluster, folder, overrides, name="cancelled", SITE_VENV=waiting, SITE_PREFLIGHT="0")
    log = folder / "runs" / "cancelled" / "slurm" / f"{job.number}-0-node1.log"
    wait_until(log.exists, 30.0, lambda: job.log)
    cluster.run("scancel", job.number)
    assert job.end() == "CANCELLED", job.log
    assert job.restarts == 0


@pytest.mark.whole
def test_ranks_that_hang_at_the_time_limit(cluster: Cluster, folder: Path, overrides: list[str]) -> None:
    deaf = python_that(folder, "--launcher", "{ trap '' TERM; sleep 600; }")
    job = submit(cluster, folder, overrides, "--time=1", name="deaf", SITE_VENV=deaf, SITE_PREFLIGHT="0")
    try:
        wait_until(lambda: "put back into the queue" in job.log, 60.0, lambda: job.log)
    finally:
        cluster.run("scancel", job.number)
    job.end()


@pytest.mark.slow
def test_a_run_of_another_architecture(cluster: Cluster, folder: Path, overrides: list[str]) -> None:
    run = folder / "runs" / "other"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("model: {architecture: vanilla}\n")
    error = error_of(submit(cluster, folder, overrides, name="other", SITE_PREFLIGHT="0"))
    assert "run other exists in" in error
    assert "model.architecture is 'vanilla' there and 'block' here" in error


@pytest.mark.whole
def test_uptraining_in_stages(cluster: Cluster, folder: Path, overrides: list[str]) -> None:
    shards = folder / "shards"
    model = {"embedder": {"kind": "lookup_projection"}}
    training = {"train": {"steps": 140}, "optimizer": {"warmup_steps": 1}, "model": model}
    config = folder / "target.yaml"
    config.write_text(config_text(small_run(folder / "runs", shards, "target", **training)))
    environment = {"RUN_CONFIG": str(config), "VANILLA": str(save_vanilla_model(folder / "vanilla"))}
    options, script = ["--block-lengths", "1,4"], ROOT / "slurm" / "uptrain.sh"
    job = submit(cluster, folder, options, name="uptrained", script=script, **environment)
    assert job.end() == "COMPLETED", job.log
    first, last = folder / "runs" / "uptrained.blocks_of_1", folder / "runs" / "uptrained"
    assert "run uptrained: complete at step 7" in job.log
    assert [CheckpointStore(run / "checkpoints").complete_steps()[-1] for run in (first, last)] == [7, 7]
    assert f"logs: {last}/slurm/{job.number}-0-NODE.log" in job.log


def test_uptraining_needs_weights(cluster: Cluster, folder: Path) -> None:
    job = submit(cluster, folder, [], script=ROOT / "slurm" / "uptrain.sh")
    assert error_of(job).startswith("error: VANILLA is not set; give the folder of the vanilla weights: VANILLA=DIR")
