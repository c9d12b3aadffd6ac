"""Measures saves, loads and restarts of a real run: benchmarks/fault_tolerance.py [--restart local|slurm]."""

import sys
from pathlib import Path

# Run as a script, the first entry of sys.path is this folder; the repository root must stand there instead.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import psutil
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from checkpoints.fragments import FragmentReader, write_fragments
from checkpoints.records import KINDS, FileRecord, Fragment, read_manifest
from checkpoints.store import CheckpointStore
from parallel.errors import ConfigurationError
from tools.command_line import run
from train.attempts import Attempt, read_attempts
from train.config import REPOSITORY

CONFIG = REPOSITORY / "configs" / "quickstart.yaml"
MIB = 1 << 20
POLL_SECONDS, PATIENCE_SECONDS = 0.05, 600.0
STACK = "{{num_layers: {layers}, hidden_size: {width}, num_attention_heads: 8}}"


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Measures how long saves block training, their bandwidth against cp with sync, and the time from a "
        "kill to the first new step. Needs the shards of `make pretrain`. See docs/fault_tolerance.md."
    )
    add = parser.add_argument
    add("--output", type=Path, default=REPOSITORY / "runs" / "fault-tolerance", metavar="DIR", help="folder for all")
    add("--width", type=int, default=512, help="hidden size of the saved model (default 512: 40 million parameters)")
    add("--layers", type=int, default=5, help="layers of each decoder (default 5)")
    add("--processes", type=int, default=2, help="data-parallel processes, ZeRO stage 1 (default 2)")
    add("--saves", type=int, default=5, help="saves of each kind (default 5)")
    add(
        "--restart",
        choices=("local", "slurm"),
        default="local",
        help="local: kill a rank and give the same command again; slurm: kill a rank of a job that puts itself back",
    )
    return parser.parse_args()


def overrides(arguments: argparse.Namespace, name: str, **values: object) -> list[str]:
    """Settings of one of the benchmark's runs."""
    settings: dict[str, object] = {
        "run.root": arguments.output,
        "run.name": name,
        "parallel.data": arguments.processes,
        "train.global_batch_size": 2 * arguments.processes,
        "train.micro_batch_size": 1,
        "validation.every": 0,
        "checkpoint.keep_last": 1,
        "logging.every": 1,
        **values,
    }
    return [f"{field}={value}" for field, value in settings.items()]


def command(settings: list[str]) -> list[str]:
    """Trains with these settings."""
    return [sys.executable, str(REPOSITORY / "tools" / "pretrain.py"), str(CONFIG), *settings]


def measure_saves(arguments: argparse.Namespace, asynchronous: bool) -> dict[str, Any]:
    """Trains with regular saves.

    Returns:
        Medians of the seconds that a save blocked training and took in all, and the step directory of the last one.
    """
    name = "asynchronous" if asynchronous else "synchronous"
    every = 6
    stack = STACK.format(layers=arguments.layers, width=arguments.width)
    changes = {
        "model.block_decoder": stack,
        "model.token_decoder": stack,
        "train.stop_step": every * arguments.saves,
        "checkpoint.every": every,
        "checkpoint.asynchronous": str(asynchronous).lower(),
    }
    settings = overrides(arguments, name, **changes)
    subprocess.run(command(settings), check=True, stdout=subprocess.DEVNULL)
    events = EventAccumulator(str(arguments.output / name / "tensorboard"))
    events.Reload()
    # The first takes the memory of the copies, the last ends with the run.
    blocked, seconds = (
        [event.value for event in events.Scalars(f"time/{tag}")[1:-1]]
        for tag in ("checkpoint_blocked_seconds", "checkpoint_seconds")
    )
    newest = CheckpointStore(arguments.output / name / "checkpoints").published()
    return {
        "blocked_seconds": statistics.median(blocked),
        "seconds": statistics.median(seconds),
        "path": str(newest[max(newest)]),
    }


def timed(action: Callable[[], object]) -> float:
    """Seconds that an action takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def measure_bandwidth(checkpoint: Path, scratch: Path, repeats: int) -> dict[str, float]:
    """Saves, copies and loads a checkpoint in turn; medians and best values, bytes per second, page cache warm."""
    manifest = read_manifest(checkpoint)
    files = {record.name: read_file(checkpoint, record) for record in manifest.files}
    store = CheckpointStore(scratch)

    def save() -> None:
        temporary = store.begin(manifest.step)
        with ThreadPoolExecutor(len(files)) as pool:  # in a run each file has a process
            records = list(pool.map(lambda item: write_fragments(temporary / item[0], item[1]), files.items()))
        store.publish(manifest.step, temporary, records, manifest.metadata)

    def copy() -> None:
        subprocess.run(["cp", "-r", checkpoint, scratch], check=True)
        subprocess.run(["sync", *scratch.iterdir()], check=True)

    def load() -> None:
        found = CheckpointStore(checkpoint.parent).newest()
        assert found is not None
        with FragmentReader(found.path) as reader:
            for kind in KINDS:
                for name in reader.names(kind):
                    reader.read_full(name, kind)

    actions = {"save": save, "cp": copy, "load": load}
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(repeats):
        for place in range(len(actions)):  # in turns: memory just given free is faster
            name = list(actions)[(turn + place * (1 + turn % 2)) % len(actions)]
            seconds[name].append(timed(actions[name]))
            shutil.rmtree(scratch, ignore_errors=True)
    size = sum(path.stat().st_size for path in checkpoint.iterdir())
    best = {f"best {name}": size / min(values) for name, values in seconds.items()}
    return {
        "bytes": float(size),
        **{name: size / statistics.median(values) for name, values in seconds.items()},
        **best,
    }


def read_file(checkpoint: Path, record: FileRecord) -> list[tuple[Fragment, Tensor]]:
    """The fragments of one file, in memory of their own."""
    with safe_open(checkpoint / record.name, framework="pt") as file:
        return [(fragment, file.get_tensor(fragment.key).clone()) for fragment in record.fragments]


def measure_local_restart(arguments: argparse.Namespace) -> dict[str, Any]:
    """Kills a rank and gives the same command again as soon as it has ended."""
    settings = overrides(arguments, "restart", **{"train.stop_step": 400, "checkpoint.every": 2})
    folder = arguments.output / "restart"
    with (arguments.output / "restart.log").open("wb") as log:
        process = subprocess.Popen(command(settings), stdout=log, stderr=log)
    wait_for_step(folder, 5, process)
    rank = list(_descendants(process.pid))[-1]
    killed = time.time()
    rank.send_signal(signal.SIGKILL)
    process.wait()
    noticed = time.time() - killed
    process = subprocess.Popen(command(settings), stdout=subprocess.DEVNULL)
    attempt = wait_for_attempt(folder, 2)
    process.terminate()
    process.wait()
    return {"noticed": noticed, **attempt.startup}


def measure_slurm_restart(arguments: argparse.Namespace) -> dict[str, Any]:
    """Kills all processes of a job's step; the job puts itself back."""
    settings = overrides(arguments, "restart-slurm", **{"train.stop_step": 2000, "checkpoint.every": 2})
    folder = arguments.output / "restart-slurm"
    script = REPOSITORY / "slurm" / "pretrain_block_1b.sh"
    environment = {**os.environ, "RUN_CONFIG": str(CONFIG), "SITE_VENV": sys.prefix}
    tasks = ["--nodes=2", f"--ntasks-per-node={arguments.processes // 2}", "--gpus-per-node=0", "--cpus-per-task=1"]
    settings = [setting for setting in settings if not setting.startswith("parallel.data=")]
    submit = ["sbatch", "--parsable", *tasks, f"--output={arguments.output}/job.log", str(script), *settings]
    answer = subprocess.run(submit, check=True, capture_output=True, text=True, cwd=REPOSITORY, env=environment).stdout
    job = answer.strip()
    try:
        wait_for_step(folder, 5)
        killed = time.time()
        steps = subprocess.run(["squeue", "-h", "-s", f"--jobs={job}", "-o", "%i"], capture_output=True, text=True)
        training = next(step for step in steps.stdout.split() if step.rpartition(".")[2].isdecimal())
        subprocess.run(["scancel", "--signal=KILL", training], check=True)
        attempt = wait_for_attempt(folder, 2)
    finally:
        subprocess.run(["scancel", job], check=True)
    first_step_at = attempt.started + attempt.startup["first_batch"] + attempt.startup["first_step"]
    return {"kill to first step": first_step_at - killed, **attempt.startup}


def _descendants(pid: int) -> Iterator[psutil.Process]:
    """The ranks: the innermost processes."""
    for child in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.Error):
            if not child.children() and "python" in child.name():
                yield child


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[bytes] | None = None) -> None:
    """Waits until a run has done a step.

    Raises:
        ConfigurationError: it has not in time, or its process has ended.
    """

    def done() -> bool:
        if process is not None and process.poll() is not None:
            raise ConfigurationError(f"{folder.name} ended with status {process.returncode}; see {folder}.log")
        with suppress(OSError, ValueError):
            return bool(json.loads((folder / "progress.json").read_text())["step"] >= step)
        return False

    _wait(done, f"{folder} did not reach step {step}")


def wait_for_attempt(folder: Path, number: int) -> Attempt:
    """Waits until an attempt has done its first step.

    Raises:
        ConfigurationError: it has not in time.
    """

    def done() -> bool:
        attempts = read_attempts(folder)
        return len(attempts) >= number and bool(attempts[number - 1].startup)

    _wait(done, f"attempt {number} of {folder} did not reach its first step")
    return read_attempts(folder)[number - 1]


def _wait(done: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not done():
        if time.monotonic() > deadline:
            raise ConfigurationError(f"{otherwise} within {PATIENCE_SECONDS:g} s; look at its logs")
        time.sleep(POLL_SECONDS)


def report(saves: dict[str, dict[str, Any]], bandwidth: dict[str, float], restart: dict[str, float]) -> str:
    """The measurements as Markdown."""
    sync, background = saves["synchronous"], saves["asynchronous"]
    size = bandwidth["bytes"]
    share = background["blocked_seconds"] / sync["blocked_seconds"]
    lines = [
        f"| checkpoint of {size / MIB:,.0f} MiB | synchronous | asynchronous |",
        "|---|---|---|",
        f"| training blocked | {sync['blocked_seconds']:.2f} s | {background['blocked_seconds']:.2f} s ({share:.0%}) |",
        f"| until it is published | {sync['seconds']:.2f} s | {background['seconds']:.2f} s |",
        "",
        "| bandwidth, MiB/s | median | best |",
        "|---|---|---|",
        *(bandwidth_row(name, bandwidth) for name in ("cp", "save", "load")),
        "",
        "| restart | seconds |",
        "|---|---|",
        *(f"| {phase.replace('_', ' ')} | {seconds:.1f} |" for phase, seconds in restart.items()),
    ]
    return "\n".join(lines)


def bandwidth_row(name: str, bandwidth: dict[str, float]) -> str:
    """A line of the table: the median and the best, and their ratios to those of cp."""
    values = [(bandwidth[kind + name], bandwidth[f"{kind}cp"]) for kind in ("", "best ")]
    return f"| {name} | " + " | ".join(f"{value / MIB:,.0f} ({value / copy:.0%})" for value, copy in values) + " |"


def main() -> int:
    """Measures everything; returns the exit status."""
    arguments = parse_arguments()
    arguments.output = arguments.output.absolute() / time.strftime("%Y%m%d-%H%M%S")
    arguments.output.mkdir(parents=True)
    saves = {}
    for asynchronous in (False, True):
        name = "asynchronous" if asynchronous else "synchronous"
        print(f"saving, {name}", flush=True)
        saves[name] = measure_saves(arguments, asynchronous)
    print("loading and copying", flush=True)
    bandwidth = measure_bandwidth(Path(saves["synchronous"]["path"]), arguments.output / "copy", arguments.saves)
    print(f"restarting ({arguments.restart})", flush=True)
    restart = (measure_slurm_restart if arguments.restart == "slurm" else measure_local_restart)(arguments)
    results = {"saves": saves, "bandwidth": bandwidth, "restart": restart}
    (arguments.output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(report(saves, bandwidth, restart))
    return 0


if __name__ == "__main__":
    run(main, ConfigurationError)
