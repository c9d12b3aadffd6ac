"""Measures the sequence stream: benchmarks/data_loading.py [--shards DIR] [--scale 1.0]."""

import sys
from pathlib import Path

# Run as a script, the first entry of sys.path is this folder; the repository root must stand there instead.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import functools
import io
import json
import resource
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.synthetic_corpus import write_synthetic_corpus
from data.config import DataConfig
from data.errors import DataError
from data.manifest import read_manifest
from data.shard_writer import LENGTHS_MEMBER, TOKENS_MEMBER
from data.streaming.stream import SequenceStream
from tools.command_line import run
from train.config import REPOSITORY

BLOCK, SEQUENCE, BATCH = 4, 2048, 8
# The Pile, deduplicated and once and a half: what the paper trains on.
TOKENS, DOCUMENTS, SHARDS = 300_000_000_000, 134_000_000, 4_000
SEEK = 0.731
Batch = tuple[Tensor, Tensor]


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Compares the stream with webdataset's own pipeline on the same shards, and times opening, "
        "seeking and the first batch on a synthetic corpus of the full size. See docs/data.md."
    )
    add = parser.add_argument
    add("--shards", type=Path, default=REPOSITORY / "runs" / "quickstart-data" / "shards", help="prepared directory")
    add("--output", type=Path, default=REPOSITORY / "runs" / "data-loading", help="folder of the synthetic corpus")
    add("--seconds", type=float, default=5.0, help="how long each throughput is measured (default 5)")
    add("--rounds", type=int, default=5, help="interleaved repetitions (default 5)")
    add("--scale", type=float, default=1.0, help="size of the synthetic corpus; 1 is 300B tokens (default 1)")
    add("--open", type=Path, help=argparse.SUPPRESS)  # the measured process of opening
    return parser.parse_args()


def stream_batches(shards: Path, padding: bool) -> Iterator[Batch]:
    """Batches of ours, shuffled, from the beginning on."""
    stream = open_stream(shards, padding)
    position = 0
    while True:
        read = stream.read(position, BATCH)
        yield torch.from_numpy(read.token_ids), torch.from_numpy(read.mask)
        position += BATCH


def open_stream(shards: Path, padding: bool = True) -> SequenceStream:
    """The stream as training opens it."""
    config = DataConfig(path=str(shards), random_left_padding=padding, pad_to_block_boundary=padding)
    return SequenceStream(config, "train", block_length=BLOCK, sequence_length=SEQUENCE)


def webdataset_batches(shards: Path, buffer: int = 0) -> Iterator[Batch]:
    """The same shards through webdataset: documents with an end of text, packed without padding, never ending.

    Args:
        shards: A prepared directory.
        buffer: Sequences that webdataset's shuffle draws from; 0: sequences come as they lie in the shards.
    """
    import webdataset

    manifest = read_manifest(shards / "train")
    files = [str(shards / "train" / record.file) for record in manifest.shards]
    pipeline = webdataset.WebDataset(files, shardshuffle=100 if len(files) > 1 else False, seed=0).repeat()
    pipeline = pipeline.decode(_decode_npy).compose(functools.partial(_packed, eos_id=manifest.eos_id))
    if buffer:
        pipeline = pipeline.shuffle(buffer)
    for ids in pipeline.batched(BATCH, collation_fn=_collate):
        yield ids, torch.ones_like(ids, dtype=torch.bool)


def _collate(sequences: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(sequences))


def _decode_npy(name: str, content: bytes) -> Any:
    return np.load(io.BytesIO(content)) if name.endswith(".npy") else None


def _packed(samples: Iterable[dict[str, Any]], eos_id: int) -> Iterator[np.ndarray]:
    """Cuts the documents of samples, laid end to end, into sequences."""
    rest = np.empty(0, dtype=np.int64)
    for sample in samples:
        tokens, lengths = sample[TOKENS_MEMBER], sample[LENGTHS_MEMBER]
        packed = np.insert(tokens.astype(np.int64), np.cumsum(lengths, dtype=np.int64), eos_id)
        rest = np.concatenate((rest, packed))
        whole = len(rest) // SEQUENCE * SEQUENCE
        yield from rest[:whole].reshape(-1, SEQUENCE)
        rest = rest[whole:]


def throughput(batches: Iterator[Batch], seconds: float) -> float:
    """Tokens per second into ready batches, after the first."""
    next(batches)
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        count += next(batches)[0].numel()
    return count / (time.perf_counter() - started)


def compare_throughput(arguments: argparse.Namespace) -> dict[str, Any]:
    """Interleaved, so that all meet the same machine."""
    kinds: dict[str, Callable[[], Iterator[Batch]]] = {
        "stream, padded blocks": lambda: stream_batches(arguments.shards, True),
        "stream, no padding": lambda: stream_batches(arguments.shards, False),
        "webdataset, no padding": lambda: webdataset_batches(arguments.shards),
        "webdataset, no padding, 1,000 shuffled": lambda: webdataset_batches(arguments.shards, 1000),
    }
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(arguments.rounds):
        for kind, make in kinds.items():
            found[kind].append(throughput(make(), arguments.seconds) / 1e6)
    return {kind: {"median": statistics.median(values), "best": max(values)} for kind, values in found.items()}


def compare_resume(shards: Path) -> dict[str, float]:
    """Seconds from nothing to the first batch, at the beginning and at the end of an epoch."""
    count = open_stream(shards).sequences_per_epoch
    found = {}
    for name, position in (("beginning", 0), ("end of the epoch", count - BATCH)):
        started = time.perf_counter()
        open_stream(shards).read(position, BATCH)
        found[f"stream, {name}"] = time.perf_counter() - started
    started = time.perf_counter()
    batches = webdataset_batches(shards)
    next(batches)
    found["webdataset, beginning"] = time.perf_counter() - started
    for _ in range(count // BATCH - 1):
        next(batches)
    found["webdataset, end of the epoch (by replay)"] = time.perf_counter() - started
    return found


def measure_opening(corpus: Path) -> dict[str, float]:
    """In this process: opening, first batches at the beginning and after a seek, and the memory for it."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    stream = open_stream(corpus)
    opened = time.perf_counter()
    stream.read(0, BATCH)
    first = time.perf_counter()
    sought = open_stream(corpus)
    sought.read(int(SEEK * sought.sequences_per_epoch), BATCH)
    return {
        "opening": opened - started,
        "opening and first batch": first - started,
        f"opening, seeking to {SEEK:.1%} and first batch": time.perf_counter() - first,
        "peak memory of the process, GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "of which before opening, GiB": before / 2**20,
    }


def measure_scale(arguments: argparse.Namespace) -> dict[str, Any]:
    """Builds a synthetic corpus and its count table, then opens it in new processes."""
    corpus = arguments.output / "corpus"
    shutil.rmtree(corpus, ignore_errors=True)
    scale = arguments.scale
    shards = max(int(SHARDS * scale), 1)
    manifest = write_synthetic_corpus(
        corpus, shards=shards, documents=int(DOCUMENTS * scale), tokens=int(TOKENS * scale)
    )
    started = time.perf_counter()
    open_stream(corpus)
    building = time.perf_counter() - started
    opened = []
    for _ in range(arguments.rounds):
        command = [sys.executable, __file__, "--open", str(corpus)]
        opened.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    return {
        "documents": manifest.documents,
        "tokens": manifest.tokens,
        "shards": len(manifest.shards),
        "seconds": {
            "building the count table": building,
            **{name: statistics.median(values[name] for values in opened) for name in opened[0]},
        },
    }


def main() -> None:
    """Measures all and prints a table, and writes it as JSON."""
    arguments = parse_arguments()
    if arguments.open:
        print(json.dumps(measure_opening(arguments.open)))
        return
    if not arguments.shards.is_dir():
        raise DataError(f"--shards {arguments.shards} does not exist; make them with make pretrain, or give others")
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    results = {
        "million tokens per second": compare_throughput(arguments),
        "seconds to the first batch": compare_resume(arguments.shards),
        "full scale": measure_scale(arguments),
    }
    (arguments.output / "data_loading.json").write_text(json.dumps(results, indent=1))
    for kind, speeds in results["million tokens per second"].items():
        print(f"{kind:45} {speeds['median']:8.1f} million tokens/s (best {speeds['best']:.1f})")
    for kind, seconds in results["seconds to the first batch"].items():
        print(f"{kind:45} {seconds:8.3f} s to the first batch")
    scale = results["full scale"]
    print(f"{scale['tokens']:,} tokens, {scale['documents']:,} documents, {scale['shards']:,} shards:")
    for kind, seconds in scale["seconds"].items():
        print(f"  {kind:43} {seconds:8.3f}")


if __name__ == "__main__":
    run(main, DataError)
