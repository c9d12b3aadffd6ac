"""tools/pretrain.py as a user runs it: real commands, real processes, mistakes and interruptions."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import submitit
import yaml

import tools.pretrain
from checkpoints.store import CheckpointStore
from parallel.errors import ConfigurationError
from slurm.local import run_submitit_task
from tests.evaluation.harness.local_files import write_local_files
from tests.tools.outcomes import assert_one_clear_error
from tests.train.small_run import prepare_small_corpus, small_run
from train.config_file import config_text

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, str(ROOT / "tools" / "pretrain.py")]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_small_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def config_file(tmp_path: Path, corpus: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(config_text(small_run(tmp_path / "runs", corpus)))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> tuple[Path, str]:
    """The config of a run that the local launcher has trained to the end, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    path = folder / "run.yaml"
    task_data = write_local_files(folder)
    tasks = {"names": ["sciq"], "every": 10, "limit": 2, "data": str(task_data)}
    path.write_text(config_text(small_run(folder / "runs", corpus, tasks=tasks)))
    result = pretrain(path, cwd=folder)
    assert result.returncode == 0, result.stderr
    return path, result.stdout


def pretrain(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, timeout=300)


def run_folder(config_file: Path) -> Path:
    return config_file.parent / "runs" / "small"


def test_local_launcher_trains_to_the_end(finished: tuple[Path, str]) -> None:
    config_file, printed = finished
    assert "step 14/14" in printed
    assert "validation loss" in printed
    assert "step 10/14  sciq: acc" in printed
    assert "step 14/14  sciq: acc" in printed
    assert "complete at step 14" in printed
    folder = run_folder(config_file)
    assert CheckpointStore(folder / "checkpoints").complete_steps()[-1] == 14
    assert list((folder / "tensorboard").glob("events*"))
    assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["steps"] == 14


def test_the_users_choice_of_gpus_reaches_the_ranks(
    finished: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Submitit's local executor would give every job the machine's first GPUs."""
    job = next(run_folder(finished[0]).glob("submitit/*/*_submitted.pkl"))
    submission = submitit.core.utils.DelayedSubmission.load(job)
    assert submission.args[-1] == os.environ["CUDA_VISIBLE_DEVICES"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(RuntimeError, match="which environment the job"):
        run_submitit_task(*submission.args[:-1], "2,3")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,3"


def test_second_start_reports_completion_and_changes_nothing(finished: tuple[Path, str]) -> None:
    config_file, _ = finished
    before = {path: path.stat().st_mtime_ns for path in run_folder(config_file).rglob("*")}
    result = pretrain(config_file)
    assert result.returncode == 0
    assert "complete at step 14; nothing to do" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in run_folder(config_file).rglob("*")} == before


def test_a_dry_run_is_quick(config_file: Path) -> None:
    """Jobs begin with one: it needs neither torch nor a GPU. Block parallelism has each rank hold the blocks whole."""
    line = (
        "import runpy, sys; runpy.run_path(sys.argv[0], run_name='__main__'); "
        "sys.exit('torch' in sys.modules and 'torch was imported')"
    )
    counts = []
    for is_block_parallel in ("true", "false"):
        layout = ["parallel.tensor=2", f"parallel.block_parallel={is_block_parallel}", "--dry-run"]
        code = f"import sys; sys.argv = {[COMMAND[1], str(config_file), *layout]!r}; {line}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
        assert (done.returncode, done.stderr) == (0, "")
        counts.append(int(done.stdout.split("size 2):\n  stage 0: ")[1].split()[0].replace(",", "")))
    assert counts[0] > counts[1]


def test_a_sweep_without_slurm_runs_one_point_after_another(
    finished: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Points that are complete are left alone."""
    config_file, _ = finished
    (tmp_path / "again").mkdir()
    shutil.copytree(run_folder(config_file), tmp_path / "again" / "small")
    sweep = tmp_path / "points.yaml"
    sweep.write_text(f"- {{run.name: small}}\n- {{run.name: small, run.root: {tmp_path}/again}}\n")
    monkeypatch.setattr(sys, "argv", ["pretrain.py", str(config_file), "--sweep", str(sweep)])
    assert tools.pretrain.main() == 0
    told = "--- run small\nrun small is complete at step 14; nothing to do\n"
    assert capsys.readouterr().out == told * 2


class SignalsAt:
    """A standard output that interrupts this process when it is told something."""

    def __init__(self, text: bytes) -> None:
        self.buffer, self._text = self, text

    def write(self, block: bytes | str) -> None:
        if isinstance(block, bytes) and self._text in block:
            os.kill(os.getpid(), signal.SIGTERM)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False


@pytest.mark.slow
def test_a_signal_that_finds_a_run_complete_stops_the_sweep(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No rank takes notice of it any more, but the next run must not start."""
    sweep = tmp_path / "points.yaml"
    sweep.write_text("- {run.name: small, train.steps: 4}\n- {run.name: next}\n")
    monkeypatch.setattr(sys, "argv", ["pretrain.py", str(config_file), "--sweep", str(sweep)])
    monkeypatch.setattr(sys, "stdout", SignalsAt(b"run small: complete at step 4"))
    assert tools.pretrain.main() == 143
    assert "stopped; this run was complete" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "next").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--wait"], "--wait is for --launcher slurm"),
        (["--at-once", "2", "--launcher", "slurm"], "--at-once is for --sweep"),
        (["--at-once", "0", "--launcher", "slurm", "--sweep", "points.yaml"], "--at-once 0 is not a positive number"),
        (["--sweep", "{points}", "--launcher", "inline"], "--sweep starts its runs itself"),
    ],
)
def test_options_that_do_not_fit(
    config_file: Path, tmp_path: Path, options: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = tmp_path / "points.yaml"
    points.write_text("- {run.name: a}\n")
    arguments = [option.format(points=points) for option in options]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", str(config_file), *arguments])
    with pytest.raises(ConfigurationError, match=message):
        tools.pretrain.main()


def test_existing_run_with_another_config_is_refused(finished: tuple[Path, str]) -> None:
    config_file, _ = finished
    result = pretrain(config_file, "optimizer.learning_rate=0.5", "train.steps=20")
    assert_one_clear_error(
        result,
        "run small exists",
        "optimizer.learning_rate is 0.01 there and 0.5 here",
        "train.steps",
        "choose another run.name",
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_resumes(config_file: Path, number: signal.Signals) -> None:
    """Signals the whole process group, as Ctrl-C in a terminal and a batch system do."""
    arguments = ["train.steps=20000", "checkpoint.every=100000", "logging.every=50"]
    process = subprocess.Popen(
        [*COMMAND, str(config_file), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 100/"):
            break
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == (130 if number is signal.SIGINT else 143), errors
    assert "the same command goes on from here" in errors
    assert "Traceback" not in errors
    steps = CheckpointStore(run_folder(config_file) / "checkpoints").complete_steps()
    assert len(steps) == 1
    assert steps[0] >= 100
    resumed = pretrain(config_file, *arguments, f"train.stop_step={steps[0] + 2}")
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming run small at step {steps[0]}" in resumed.stdout
    attempts = list((run_folder(config_file) / "submitit").iterdir())
    assert [len(list(attempt.glob("*_0_log.out"))) for attempt in attempts] == [1, 1]


@pytest.mark.slow
def test_a_reader_that_goes_away_stops_the_run(config_file: Path) -> None:
    """As in `tools/pretrain.py CONFIG | head`: the ranks must not train on unseen."""
    arguments = ["train.steps=20000", "checkpoint.every=100000", "logging.every=1"]
    process = subprocess.Popen(
        [*COMMAND, str(config_file), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    for line in process.stdout:
        if line.startswith("step 3/"):
            break
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(timeout=120) == 143, errors
    assert "Traceback" not in errors
    assert "the same command goes on from here" in errors
    assert CheckpointStore(run_folder(config_file) / "checkpoints").complete_steps()


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.5, 3.0])
def test_signal_during_start_is_not_lost(config_file: Path, delay: float) -> None:
    """Only the command itself gets the signal, as from `kill PID`, while its processes are still starting."""
    process = subprocess.Popen(
        [*COMMAND, str(config_file), "train.steps=20000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    time.sleep(delay)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode in (143, -signal.SIGTERM), errors
    assert "Traceback" not in errors


@pytest.mark.slow
def test_a_rank_lost_before_all_have_met_ends_the_job(config_file: Path) -> None:
    """The other one waits for it, and would for half an hour."""
    process = subprocess.Popen(
        [*COMMAND, str(config_file), "train.steps=20000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    ranks: list[psutil.Process] = []
    while len(ranks) < 2 and time.monotonic() < deadline:
        ranks = [rank for child in psutil.Process(process.pid).children() for rank in child.children()]
    min(ranks, key=lambda rank: rank.pid).kill()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 137
    assert errors.strip().splitlines()[-1].startswith("error: rank 0 was killed")
    assert not any(rank.is_running() for rank in ranks)


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_with_its_name(config_file: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, str(config_file), "train.steps=20000", "logging.every=50"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 50/"):
            break
    controller = next(child for child in psutil.Process(process.pid).children() if child.children())
    sorted(controller.children(), key=lambda rank: rank.pid)[1].kill()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "error: rank 1 was killed" in errors
    assert "error: rank 0 failed: RuntimeError" in errors


@pytest.mark.slow
def test_two_writers_on_one_run_are_refused(config_file: Path) -> None:
    arguments = [str(config_file), "train.steps=20000", "logging.every=50"]
    first = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert first.stdout is not None
        for line in first.stdout:
            if line.startswith("step 50/"):
                break
        assert_one_clear_error(pretrain(*arguments), "run small is being written by another job", "run.name")
    finally:
        os.killpg(first.pid, signal.SIGTERM)
        first.communicate(timeout=120)


def test_dry_run_prints_split_and_total_and_writes_nothing(config_file: Path) -> None:
    result = pretrain(config_file, "--dry-run", "parallel.pipeline=2")
    assert result.returncode == 0, result.stderr
    assert "stage 0:" in result.stdout
    assert "stage 1:" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("parameters: ")
    assert not run_folder(config_file).exists()


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["model.prefix_lenght=2"], ["unknown field model.prefix_lenght", "model.prefix_length"]),
        (["train.stepz=3"], ["unknown field train.stepz", "train.steps"]),
        (["train.steps=many"], ["train.steps='many'", "integer"]),
        (["train.steps=0"], ["train.steps=0", "greater than or equal to 1"]),
        (["nonsense"], ["'nonsense'", "section.field=value"]),
        (["parallel.tensor=3"], ["num_attention_heads=4", "parallel.tensor=3"]),
        (["parallel.pipeline=8"], ["parallel.pipeline=8", "3 layers"]),
        (["parallel.pipeline=2", "parallel.zero_stage=3"], ["zero_stage=3", "pipeline=2"]),
        (["parallel.sequence_parallel=true"], ["sequence_parallel=true", "tensor > 1"]),
        (["parallel.data=3"], ["train.global_batch_size=4", "parallel.data=3"]),
        (["model.block_length=5"], ["sequence_length=64", "block_length=5"]),
        (["train.precision=bf16", "parallel.zero_stage=0"], ["zero_stage=0", "bf16"]),
        (["model.architecture=vanilla"], ["architecture=vanilla", "block_decoder"]),
        (["optimizer.warmup_steps=14"], ["warmup_steps=14", "train.steps=14"]),
        (["model.vocab_size=100"], ["model.vocab_size=100", "at least 384"]),
        (["train.global_batch_size=60", "train.micro_batch_size=30"], ["41 sequences", "60"]),
        (["data.path=nowhere"], ["nowhere", "tools/prepare_data.py"]),
    ],
)
def test_bad_settings(config_file: Path, overrides: list[str], parts: list[str]) -> None:
    assert_one_clear_error(pretrain(config_file, *overrides), *parts)
    assert not run_folder(config_file).exists()


def test_a_run_folder_that_cannot_be_written_or_read(config_file: Path) -> None:
    assert_one_clear_error(pretrain(config_file, "run.root=/proc/runs"), "/proc/runs", "change run.root")
    run_folder(config_file).mkdir(parents=True)
    (run_folder(config_file) / "config.yaml").write_text("model: [")
    assert_one_clear_error(pretrain(config_file), "config.yaml cannot be read as YAML")


def test_missing_compiler_is_one_clear_error(config_file: Path, tmp_path: Path) -> None:
    """An extension cache without DeepSpeed's op, as after `make clean`, on a machine without a compiler."""
    environment = {**os.environ, "PATH": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    result = subprocess.run([*COMMAND, str(config_file)], capture_output=True, text=True, env=environment, timeout=300)
    assert_one_clear_error(result, "g++ is missing", "tools/build_extensions.py")


def test_missing_and_unreadable_config(tmp_path: Path) -> None:
    assert_one_clear_error(pretrain(tmp_path / "none.yaml"), "none.yaml does not exist")
    (tmp_path / "bad.yaml").write_text("model: [1, 2")
    assert_one_clear_error(pretrain(tmp_path / "bad.yaml"), "bad.yaml cannot be read as YAML")


def test_inline_without_a_job_is_refused(config_file: Path) -> None:
    assert_one_clear_error(pretrain(config_file, "--launcher", "inline"), "--launcher inline needs RANK")


def test_truncated_shard_is_refused(config_file: Path, corpus: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(corpus, damaged)
    shard = next((damaged / "train").glob("*.tar"))
    os.truncate(shard, shard.stat().st_size // 2)
    assert_one_clear_error(pretrain(config_file, f"data.path={damaged}"), shard.name, "bytes")
    assert not run_folder(config_file).exists()


def test_other_tokenizer_is_refused(config_file: Path, corpus: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.model"
    other.write_bytes(next(corpus.glob("*.model")).read_bytes() + b"\n")
    assert_one_clear_error(pretrain(config_file, f"data.tokenizer={other}"), "other.model", "fingerprint")


@pytest.fixture
def resumable(finished: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of the finished run that has some steps left."""
    source, _ = finished
    shutil.copytree(run_folder(source), tmp_path / "runs" / "small")
    values = yaml.safe_load(source.read_text())
    values["run"]["root"] = str(tmp_path / "runs")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    shutil.rmtree(run_folder(path) / "checkpoints" / "step_00000014")
    return path


@pytest.mark.slow
def test_damaged_checkpoints_are_refused_not_restarted(resumable: Path) -> None:
    steps = sorted((run_folder(resumable) / "checkpoints").glob("step_*"))
    assert len(steps) == 1
    file = next(steps[0].glob("*.safetensors"))
    os.truncate(file, file.stat().st_size - 100)
    result = pretrain(resumable)
    assert_one_clear_error(result, "no checkpoint", "rank_0000", "bytes")
    assert steps[0].is_dir(), "nothing was removed"


@pytest.mark.slow
def test_changed_shards_under_a_run_are_refused(resumable: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    shutil.copy(Path(yaml.safe_load(resumable.read_text())["data"]["path"]).parent / "train.txt", folder)
    other = prepare_small_corpus(folder, start=30_000)
    assert_one_clear_error(
        pretrain(resumable, f"data.path={other}"), "data differs from what the run was trained on", "tokenizer"
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for about one checkpoint."""
    folder = tmp_path / "small-disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mounting a small tmpfs is not permitted here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_full_disk_while_saving(config_file: Path, small_disk: Path) -> None:
    """The first checkpoint fits, a later one does not: the run ends with the reason and the first stays usable."""
    result = pretrain(config_file, f"run.root={small_disk}", "checkpoint.every=1", "checkpoint.keep_last=50")
    assert_one_clear_error(result, "cannot write", "No space left", "free space")
    newest = CheckpointStore(small_disk / "small" / "checkpoints").newest()
    assert newest is not None
    assert newest.step >= 1
