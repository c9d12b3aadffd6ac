"""slurm/pretrain_block_1b.sh without a cluster: its messages, its plan, and a shrunken run.

Stand-ins on PATH play the parts of srun, scontrol and squeue: the script, the training command and its processes are
the real ones.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoints.store import CheckpointStore
from tests.train.small_run import VOCABULARY, prepare_small_corpus

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "slurm" / "pretrain_block_1b.sh"
CONFIG = "configs/paper/block_main_b4_1.2b.yaml"
STACK = "{num_layers: 1, hidden_size: 32, num_attention_heads: 4}"
START_TWO_RANKS = """#!/usr/bin/env bash
shift
export SLURM_STEP_ID=0 SLURM_NODEID=0 SLURM_STEP_NUM_NODES=1 SLURM_STEP_TASKS_PER_NODE=2
for rank in 0 1; do
  SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" &
  ranks+=($!)
done
status=0
for rank in "${ranks[@]}"; do wait "$rank" || status=$?; done
exit $status
"""
JOB = {
    "SLURM_JOB_ID": "41",
    "SLURM_SUBMIT_DIR": str(ROOT),
    "SLURM_JOB_NODELIST": "localhost",
    "SLURM_NTASKS": "2",
    "VENV": sys.prefix,
}


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A folder of commands for PATH; what scontrol is asked for is noted in the file `requests`."""
    commands = tmp_path / "bin"
    commands.mkdir()
    write_command(commands / "srun", START_TWO_RANKS)
    write_command(
        commands / "scontrol",
        f'#!/usr/bin/env bash\necho "$*" >> {tmp_path}/requests\n[[ $1 == requeue ]] || echo localhost\n',
    )
    write_command(commands / "squeue", "#!/usr/bin/env bash\necho ${STATE:-RUNNING}\n")
    return commands


def write_command(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def start(
    *arguments: str, path: Path | None = None, script: Path = SCRIPT, **environment: str
) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MASTER_"))}
    if path is not None:
        inherited["PATH"] = f"{path}{os.pathsep}{inherited['PATH']}"
    return subprocess.run(
        ["bash", script, *arguments],
        env=inherited | environment,
        cwd=script.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )


def shrunken(tmp_path: Path, shards: Path) -> list[str]:
    return [
        f"run.root={tmp_path / 'runs'}",
        f"model.vocab_size={VOCABULARY}",
        "model.sequence_length=64",
        f"model.block_decoder={STACK}",
        f"model.token_decoder={STACK}",
        f"data.path={shards}",
        "train.steps=2",
        "train.global_batch_size=4",
        "train.micro_batch_size=1",
        "optimizer.warmup_steps=1",
        "validation.sequences=4",
    ]


def test_is_a_valid_script() -> None:
    assert os.access(SCRIPT, os.X_OK)
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--exclude=SC1090", SCRIPT], check=True)


def test_the_folder_of_its_log_is_in_a_clone() -> None:
    directives = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in SCRIPT.read_text().splitlines()
        if line.startswith("#SBATCH")
    )
    assert directives["signal"] == "TERM@300", "without B: the ranks get the signal, not the script"
    folder = Path(directives["output"]).parent
    if (ROOT / ".git").exists():
        tracked = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=True)
        assert tracked.stdout.splitlines() == [f"{folder}/.gitkeep"]


def test_started_without_slurm() -> None:
    result = start()
    assert result.returncode == 2
    assert result.stderr == "error: this is a Slurm job; submit it: sbatch slurm/pretrain_block_1b.sh\n"


def test_submitted_from_elsewhere(tmp_path: Path) -> None:
    result = start(**{**JOB, "SLURM_SUBMIT_DIR": str(tmp_path)})
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {tmp_path} is not the repository; submit from its root: cd ")


def test_in_a_bare_clone(tmp_path: Path) -> None:
    """Nothing installed, then nothing prepared."""
    for folder in ("slurm", "tools", "configs", "train", "parallel", "data", "checkpoints"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    job = {**JOB, "SLURM_SUBMIT_DIR": str(tmp_path)}
    result = start(**{**job, "VENV": ".venv"})
    assert result.returncode == 2
    assert result.stderr == "error: no Python environment in .venv; create it with: make install\n"
    result = start(**job)
    assert result.returncode == 2
    shards = tmp_path / "runs" / "pile" / "shards"
    assert result.stderr.startswith(
        f"error: no training data in {shards}; make it with: {sys.prefix}/bin/python tools/"
    )
    assert result.stderr.endswith(f" --output {shards}\n")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.step=3"], "unknown field train.step; the nearest is train.steps"),
        (["parallel.tensor=4"], "2 processes cannot hold replicas of 4"),
    ],
)
def test_mistakes(overrides: list[str], message: str) -> None:
    result = start(*overrides, **JOB)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("error: ") == 1


def test_parameters_of_its_config() -> None:
    command = [sys.executable, "tools/pretrain.py", CONFIG, "--dry-run"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    width, vocabulary, layers, prefix, block = 2048, 50304, 24, 2, 4
    tables = vocabulary * (width // block) + 2 * vocabulary * width
    expansion = prefix * width * (width + 1)
    total = layers * (12 * width**2 + 13 * width) + 2 * 2 * width + tables + expansion
    assert f"parameters: {total}" in result.stdout.splitlines()
    assert "tokens per step: 1,048,576; in all: 299,892,736,000" in result.stdout.splitlines()
    assert "processes: 16" in result.stdout.splitlines()


@pytest.mark.slow
def test_a_shrunken_run_and_its_resumption(tmp_path: Path, cluster: Path) -> None:
    arguments = shrunken(tmp_path, prepare_small_corpus(tmp_path))
    first = start(*arguments, "train.stop_step=1", path=cluster, **JOB)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "complete at step 1" in first.stdout
    second = start(*arguments, path=cluster, **JOB)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "resuming run block_main_b4_1.2b at step 1" in second.stdout
    folder = tmp_path / "runs" / "block_main_b4_1.2b"
    assert CheckpointStore(folder / "checkpoints").complete_steps() == [1, 2]
    assert "  data: 2\n" in (folder / "config.yaml").read_text()
    assert (tmp_path / "requests").read_text() == "show hostnames localhost\n" * 2, "no requeue of a complete run"


@pytest.mark.parametrize(
    ("status", "job", "stuck", "requeued"),
    [
        (143, {}, 0, True),
        (143, {"STATE": "COMPLETING"}, 0, False),  # cancelled
        (1, {}, 2, True),
        (1, {}, 3, False),
        (2, {}, 0, False),
        (0, {}, 0, False),
    ],
)
def test_requeues_itself_while_the_run_gets_on(
    tmp_path: Path, cluster: Path, status: int, job: dict[str, str], stuck: int, requeued: bool
) -> None:
    write_command(cluster / "srun", f"#!/usr/bin/env bash\nexit {status}\n")
    (tmp_path / "shards").mkdir()
    run = tmp_path / "runs" / "block_main_b4_1.2b"
    run.mkdir(parents=True)
    (run / "requeues.jsonl").write_text('{"time": 0.0, "job": "41", "status": 1, "step": 0}\n' * stuck)
    result = start(*shrunken(tmp_path, tmp_path / "shards"), path=cluster, **JOB, **job)
    assert ("requeue 41" in (tmp_path / "requests").read_text().splitlines()) is requeued
    assert result.returncode == status
    if stuck == 3:
        assert "3 restarts in a row made no checkpoint after step 0" in result.stdout
