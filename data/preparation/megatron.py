"""Imports Megatron's indexed datasets: all of it or, under the final name, nothing."""

import functools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from data.errors import DataError
from data.files import write_atomically
from data.manifest import FORMAT_VERSION, Manifest, ShardRecord, dtype_for, read_manifest, write_manifest
from data.preparation.indexed_dataset import IndexedDataset
from data.preparation.inputs import check_no_file_twice, identify
from data.preparation.megatron_records import (
    ImportRecord,
    ImportRequest,
    ImportStatistics,
    ImportSummary,
    check_same_request,
    read_import_record,
)
from data.preparation.megatron_shards import (
    EndOfText,
    PlannedShard,
    Selection,
    ShardTask,
    build_shard,
    compare_shard,
    plan_shards,
)
from data.preparation.output_directory import locked_directory, publish
from data.preparation.parallel_shards import build_shards
from data.preparation.progress import Progress
from data.preparation.records import RECORD_NAME
from data.preparation.workers import WorkerPool
from data.shards import check_sizes
from data.tokenizer import Tokenizer, load_tokenizer

Result = TypeVar("Result")


@dataclass(frozen=True)
class ImportOptions:
    """What to import.

    Attributes:
        inputs: Datasets of the training split, and of the validation split if that is a fraction: paths without .idx
            and .bin.
        output: Directory to make.
        tokenizer: Tokenizer file that the datasets were made with.
        validation_inputs: Datasets of the validation split.
        validation_fraction: Or: the share of documents, chosen by their numbers, that go to validation.
        workers: Number of processes.
        shard_tokens: A shard ends with the document that reaches this number of tokens.
        end_of_text: Whether an end of text that ends a document is left out; packing puts one there anyway.
        progress: Whether to show progress.
    """

    inputs: tuple[Path, ...]
    output: Path
    tokenizer: Path
    validation_inputs: tuple[Path, ...] = ()
    validation_fraction: float = 0.0
    workers: int = 1
    shard_tokens: int = 2**25
    end_of_text: EndOfText = "strip"
    progress: bool = True


@dataclass(frozen=True)
class _Import:
    options: ImportOptions
    datasets: dict[str, list[IndexedDataset]]
    tokenizer: Tokenizer
    request: ImportRequest


def import_megatron(options: ImportOptions) -> ImportSummary:
    """Turns indexed datasets into shards.

    The output appears under its name only when complete; an interrupted run leaves `.NAME.partial` beside it, and the
    same call goes on from the shards finished there.

    Args:
        options: What to import.

    Returns:
        What the output directory holds.

    Raises:
        DataError: A bad option, dataset or tokenizer, a full disk, or an output directory with other content.
    """
    return _explained(options, lambda job: _existing(job) or _import_locked(job))


def check_import(options: ImportOptions) -> str:
    """Compares an imported directory with its datasets, token by token.

    Args:
        options: What it was imported with.

    Returns:
        A sentence about what was compared.

    Raises:
        DataError: They differ, or the directory was imported with other options.
    """
    return _explained(options, _compare)


def _explained(options: ImportOptions, function: Callable[[_Import], Result]) -> Result:
    try:
        return function(_open(options))
    except OSError as error:
        raise DataError(
            f"{error.filename or options.output}: {error.strerror}; free space or fix permissions and give the same "
            "command again"
        ) from error


def _open(options: ImportOptions) -> _Import:
    if options.validation_inputs and options.validation_fraction:
        raise DataError("--validation-input and --validation-fraction exclude each other; give one of them")
    if not 0 <= options.validation_fraction < 1:
        raise DataError(f"--validation-fraction {options.validation_fraction} must be at least 0 and below 1")
    for name in ("workers", "shard_tokens"):
        if getattr(options, name) < 1:
            raise DataError(f"--{name.replace('_', '-')} {getattr(options, name)} must be at least 1")
    tokenizer = load_tokenizer(options.tokenizer)
    train = [IndexedDataset(prefix) for prefix in options.inputs]
    validation = [IndexedDataset(prefix) for prefix in options.validation_inputs]
    check_no_file_twice(path for dataset in train + validation for path in dataset.paths)
    request = ImportRequest(
        format_version=FORMAT_VERSION,
        tokenizer_fingerprint=tokenizer.fingerprint,
        inputs=tuple(identify(path) for dataset in train for path in dataset.paths),
        validation_inputs=tuple(identify(path) for dataset in validation for path in dataset.paths),
        validation_fraction=options.validation_fraction,
        shard_tokens=options.shard_tokens,
        end_of_text=options.end_of_text,
    )
    datasets = {"train": train, "validation": validation or train}
    return _Import(options, {split: datasets[split] for split in request.splits}, tokenizer, request)


def _existing(job: _Import) -> ImportSummary | None:
    output = job.options.output
    record = check_same_request(output, job.request)
    if record is None:
        return None
    for split in job.request.splits:
        check_sizes(output / split, read_manifest(output / split))
    return ImportSummary(output, record.statistics, already_prepared=True)


def _import_locked(job: _Import) -> ImportSummary:
    output = job.options.output
    partial = output.with_name(f".{output.name}.partial")
    with locked_directory(partial):
        # Another process may have finished it in the meantime.
        if (existing := _existing(job)) is None:
            _keep_only_same_request(partial, job.request)
            try:
                statistics = _build(job, partial)
            except BaseException:
                if not any(partial.glob("output/*/*.tar")):
                    shutil.rmtree(partial)  # Nothing in it is worth keeping.
                raise
            publish(partial / "output", output)
        shutil.rmtree(partial)
    return existing or ImportSummary(output, statistics, already_prepared=False)


def _keep_only_same_request(partial: Path, request: ImportRequest) -> None:
    record = read_import_record(partial)
    if record is not None and record.request == request:
        return
    for child in partial.iterdir():
        shutil.rmtree(child) if child.is_dir() else child.unlink()
    write_atomically(partial / RECORD_NAME, ImportRecord(request=request).model_dump_json(indent=1).encode())


def _build(job: _Import, partial: Path) -> dict[str, ImportStatistics]:
    for dataset in {dataset for datasets in job.datasets.values() for dataset in datasets}:
        dataset.check()
    built, statistics = partial / "output", {}
    for split in job.request.splits:
        planned = _plan(job, split)
        tasks = [task for task, _ in planned]
        with Progress(split, "shards", len(tasks), shown=job.options.progress) as progress:
            shards = build_shards(
                built / split,
                partial / f"{split}.jsonl",
                tasks,
                build_shard,
                job.options.workers,
                functools.partial(_advance, progress),
            )
        write_manifest(built / split, _manifest(job, shards))
        statistics[split] = _statistics(shards, [shard for _, shard in planned])
    write_atomically(built / f"tokenizer{job.tokenizer.path.suffix}", job.tokenizer.path.read_bytes())
    record = ImportRecord(request=job.request, statistics=statistics)
    write_atomically(built / RECORD_NAME, record.model_dump_json(indent=1).encode())
    return statistics


def _advance(progress: Progress, shard: ShardRecord) -> None:
    progress.update(1, shard.tokens)


def _plan(job: _Import, split: str) -> list[tuple[ShardTask, PlannedShard]]:
    planned, fraction = [], job.options.validation_fraction
    for number, dataset in enumerate(job.datasets[split]):
        selection = Selection(number, fraction, chosen=split == "validation" and fraction > 0)
        for shard in plan_shards(dataset, selection, job.options.shard_tokens):
            task = ShardTask(
                prefix=dataset.prefix,
                first=shard.first,
                last=shard.last,
                selection=selection,
                vocab_size=job.tokenizer.vocab_size,
                eos_id=job.tokenizer.eos_id,
                end_of_text=job.options.end_of_text,
                dtype=dtype_for(job.tokenizer.vocab_size),
            )
            planned.append((task, shard))
    if not planned:
        raise DataError(
            f"no document went to the {split} split of {job.options.output}; give more documents, or another "
            "--validation-fraction or --validation-input"
        )
    return planned


def _manifest(job: _Import, shards: Sequence[ShardRecord]) -> Manifest:
    return Manifest(
        format_version=FORMAT_VERSION,
        tokenizer_file=f"tokenizer{job.tokenizer.path.suffix}",
        tokenizer_fingerprint=job.tokenizer.fingerprint,
        vocab_size=job.tokenizer.vocab_size,
        eos_id=job.tokenizer.eos_id,
        dtype=dtype_for(job.tokenizer.vocab_size),
        shards=tuple(shards),
    )


def _statistics(shards: Sequence[ShardRecord], planned: Sequence[PlannedShard]) -> ImportStatistics:
    documents, tokens = sum(shard.documents for shard in shards), sum(shard.tokens for shard in shards)
    return ImportStatistics(
        documents=documents,
        tokens=tokens,
        shards=len(shards),
        empty_documents=sum(shard.documents for shard in planned) - documents,
        stripped_tokens=sum(shard.tokens for shard in planned) - tokens,
    )


def _compare(job: _Import) -> str:
    output = job.options.output
    if check_same_request(output, job.request) is None:
        raise DataError(f"output {output} does not exist; import it first, without --check")
    shards, tokens = 0, 0
    for split in job.request.splits:
        manifest = read_manifest(output / split)
        check_sizes(output / split, manifest)
        tasks = list(enumerate(task for task, _ in _plan(job, split)))
        if len(tasks) != len(manifest.shards):
            raise DataError(
                f"{output / split} has {len(manifest.shards):,} shards instead of {len(tasks):,}; delete the output "
                "and import it again"
            )
        initialize = functools.partial(_comparer, output / split, manifest)
        pool: WorkerPool[tuple[int, ShardTask], int] = WorkerPool(initialize, job.options.workers, in_hand=1)
        with pool, Progress(f"checking {split}", "shards", len(tasks), shown=job.options.progress) as progress:
            for compared in pool.map(tasks):
                tokens += compared
                progress.update(1, compared)
        shards += len(tasks)
    return f"{tokens:,} tokens in {shards:,} shards of {output} are those of the datasets"


def _comparer(directory: Path, manifest: Manifest) -> Callable[[tuple[int, ShardTask]], int]:
    def compare(numbered: tuple[int, ShardTask]) -> int:
        index, task = numbered
        return compare_shard(task, directory, manifest, index)

    return compare
