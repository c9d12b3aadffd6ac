"""Compares preparation with the tokenizer library alone: benchmarks/preparation.py --input FILE --tokenizer FILE."""

import sys
from pathlib import Path

# Run as a script, the first entry of sys.path is this folder; the repository root must stand there instead.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator

from data.errors import DataError
from data.manifest import read_manifest
from data.preparation.documents import read_documents
from tools.command_line import run

REPOSITORY = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
# What a user would write without this project, after the best of the library's manual; times the loop only.
LOOP = """
import json, sys, time, tokenizers
tokenizer = tokenizers.Tokenizer.from_file(sys.argv[1])
texts = [json.loads(line)["text"] for line in open(sys.argv[2], encoding="utf-8")]
print("ready", flush=True)
sys.stdin.readline()
started, tokens = time.perf_counter(), 0
for text in texts:
    tokens += len(tokenizer.METHOD.ids)
print(json.dumps([tokens, time.perf_counter() - started]))
"""
METHODS = {
    "encode": "encode(text, add_special_tokens=False)",
    "encode_batch_fast": "encode_batch_fast([text], add_special_tokens=False)[0]",
}


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Measures tokens per second of tools/prepare_data.py with several numbers of workers, from start "
        "to end, and of the tokenizers library called in a loop in as many processes. See docs/data.md."
    )
    add = parser.add_argument
    add("--input", type=Path, required=True, metavar="FILE", help="text to take a sample of")
    add("--tokenizer", type=Path, required=True, metavar="FILE", help="tokenizer.json")
    add("--output", type=Path, default=REPOSITORY / "runs" / "preparation", metavar="DIR", help="folder for all")
    add("--megabytes", type=float, default=40.0, metavar="N", help="size of the sample (default %(default)g)")
    add(
        "--document-characters", type=int, default=6000, metavar="N", help="cut documents to this (default %(default)s)"
    )
    add("--workers", type=int, nargs="+", default=[1, 2], metavar="N", help="numbers of processes (default 1 2)")
    add("--repeats", type=int, default=3, metavar="N", help="measurements of each, in turns (default %(default)s)")
    return parser.parse_args()


def write_samples(arguments: argparse.Namespace) -> Path:
    """Writes the sample, and for each number of processes the parts that loops in them take.

    Returns:
        The sample.
    """
    sample = arguments.output / "sample.jsonl"
    lines = list(_lines(arguments))
    sample.write_text("".join(lines), encoding="utf-8")
    for count in arguments.workers:
        for number in range(count):
            part = arguments.output / f"part-{number}-of-{count}.jsonl"
            part.write_text("".join(lines[number::count]), encoding="utf-8")
    return sample


def _lines(arguments: argparse.Namespace) -> Iterator[str]:
    size, length = 0.0, arguments.document_characters
    for document in read_documents(arguments.input):
        for start in range(0, len(document), length):
            line = json.dumps({"text": document[start : start + length]}, ensure_ascii=False) + "\n"
            size += len(line.encode()) / 1e6
            if size > arguments.megabytes:
                return
            yield line


def loop_rate(arguments: argparse.Namespace, method: str, count: int) -> float:
    """Tokens per second of the library alone, in `count` processes at once."""
    code = LOOP.replace("METHOD", METHODS[method])
    parts = [arguments.output / f"part-{number}-of-{count}.jsonl" for number in range(count)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(arguments.tokenizer), str(part)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )
        for part in parts
    ]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    results = [json.loads(answer) for answer in _answers(processes)]
    return float(sum(tokens for tokens, _ in results) / max(seconds for _, seconds in results))


def _answers(processes: "list[subprocess.Popen[str]]") -> list[str]:
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    return [process.communicate()[0] for process in processes]


def preparation_rate(arguments: argparse.Namespace, sample: Path, count: int) -> float:
    """Tokens per second of the whole command, from its start to its end."""
    output = arguments.output / "shards"
    tool = [sys.executable, str(REPOSITORY / "tools" / "prepare_data.py")]
    options = ["--input", sample, "--tokenizer", arguments.tokenizer, "--output", output, "--workers", count]
    started = time.perf_counter()
    subprocess.run([*tool, *map(str, options)], check=True, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    seconds = time.perf_counter() - started
    tokens = read_manifest(output / "train").tokens
    shutil.rmtree(output)
    return tokens / seconds


def measure(arguments: argparse.Namespace, sample: Path) -> dict[str, dict[int, list[float]]]:
    """Tokens per second of each way with each number of processes, all of them in turns."""
    ways: dict[str, Callable[[int], float]] = {
        "encode": lambda count: loop_rate(arguments, "encode", count),
        "encode_batch_fast": lambda count: loop_rate(arguments, "encode_batch_fast", count),
        "prepare_data": lambda count: preparation_rate(arguments, sample, count),
    }
    rates: dict[str, dict[int, list[float]]] = {way: {count: [] for count in arguments.workers} for way in ways}
    for turn in range(arguments.repeats):
        for way, count in itertools.product(ways, arguments.workers):
            rates[way][count].append(ways[way](count))
            print(f"{turn + 1}/{arguments.repeats} {way}, {count}: {rates[way][count][-1]:,.0f} tokens/s", flush=True)
    return rates


def report(rates: dict[str, dict[int, list[float]]]) -> str:
    """Medians and best values as Markdown; shares are of the same number of library processes."""
    lines = [
        "| tokens/s | library, `encode` | library, `encode_batch_fast` | prepare_data | of `encode` | of the faster |",
        "|---|---|---|---|---|---|",
    ]
    picks: dict[str, Callable[[list[float]], float]] = {"median": statistics.median, "best": max}
    for count, (name, pick) in itertools.product(rates["prepare_data"], picks.items()):
        plain, fast, ours = (pick(rates[way][count]) for way in ("encode", "encode_batch_fast", "prepare_data"))
        shares = f"{ours / plain:.0%} | {ours / max(plain, fast):.0%}"
        lines.append(
            f"| {count} process{'es' * (count > 1)}, {name} | {plain:,.0f} | {fast:,.0f} | {ours:,.0f} | {shares} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Measures everything; returns the exit status."""
    arguments = parse_arguments()
    arguments.output = arguments.output.absolute() / time.strftime("%Y%m%d-%H%M%S")
    arguments.output.mkdir(parents=True)
    sample = write_samples(arguments)
    rates = measure(arguments, sample)
    (arguments.output / "results.json").write_text(json.dumps(rates, indent=2) + "\n")
    print(report(rates))
    return 0


if __name__ == "__main__":
    run(main, DataError)
