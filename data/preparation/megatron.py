"""Imports Megatron's indexed datasets: all of it or, under the final name, nothing."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from data.errors import DataError
from data.files import write_atomically
from data.manifest import FORMAT_VERSION, Manifest, ShardRecord, dtype_for, read_manifest, write_manifest
from data.preparation.indexed_dataset import IndexedDataset
from data.preparation.inputs import check_no_file_twice, identify
from data.preparation.megatron_records import ImportRecord, ImportRequest, ImportStatistics, ImportSummary
from data.preparation.megatron_shards import (
    EndOfText,
    EndOfTextRule,
    Selection,
    ShardTask,
    build_shard,
    compare_shard,
    plan_shards,
)
from data.preparation.output_directory import EmptySplitError, OutputDirectory, resolve_output
from data.preparation.parallel_shards import build_shards
from data.preparation.progress import Progress
from data.preparation.requests import check_at_least, check_validation_options
from data.preparation.workers import WorkerPool
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
    output: OutputDirectory[ImportRecord]

    @property
    def all_datasets(self) -> list[IndexedDataset]:
        """Each once, also if both splits draw from it."""
        return list(dict.fromkeys(dataset for datasets in self.datasets.values() for dataset in datasets))


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

    def make(job: _Import) -> ImportSummary:
        record, already_prepared = job.output.make(lambda: _build(job))
        return ImportSummary(job.output.path, record.statistics, already_prepared)

    return _explained(options, make)


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
    check_validation_options(options.validation_inputs, options.validation_fraction)
    check_at_least(options, {"workers": 1, "shard_tokens": 1})
    output = resolve_output(options.output)
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
    selected = {split: datasets[split] for split in request.splits}
    return _Import(options, selected, tokenizer, request, OutputDirectory(output, request, ImportRecord))


def _build(job: _Import) -> ImportRecord:
    for dataset in job.all_datasets:
        dataset.check()
    built, statistics = job.output.built, {}
    # All before the first shard is built: a split may turn out empty.
    plans = {split: _plan(job, split) for split in job.request.splits}
    for split, plan in plans.items():
        tasks = plan.tasks
        with Progress(split, "shards", len(tasks), shown=job.options.progress) as progress:
            shards = build_shards(
                built / split,
                job.output.partial / f"{split}.jsonl",
                tasks,
                build_shard,
                job.options.workers,
                functools.partial(_advance, progress),
            )
        write_manifest(built / split, _manifest(job, shards))
        statistics[split] = _statistics(shards, plan)
    _check_nothing_lost(job, statistics)
    write_atomically(built / f"tokenizer{job.tokenizer.path.suffix}", job.tokenizer.path.read_bytes())
    return ImportRecord(request=job.request, statistics=statistics)


def _advance(progress: Progress, shard: ShardRecord) -> None:
    progress.update(1, shard.tokens)


@dataclass(frozen=True)
class _SplitPlan:
    """Tasks of all shards of a split; numbers of documents and tokens in its datasets."""

    tasks: tuple[ShardTask, ...]
    empty_documents: int
    tokens: int


def _plan(job: _Import, split: str) -> _SplitPlan:
    tasks, empty_documents, tokens = [], 0, 0
    fraction = job.options.validation_fraction
    rule = EndOfTextRule(job.tokenizer.eos_id, job.options.end_of_text)
    for number, dataset in enumerate(job.datasets[split]):
        selection = Selection(number, fraction, chosen=split == "validation" and fraction > 0)
        plan = plan_shards(dataset, selection, job.options.shard_tokens, rule)
        empty_documents += plan.empty_documents
        tokens += plan.tokens
        for shard in plan.shards:
            task = ShardTask(
                prefix=dataset.prefix,
                first=shard.first,
                last=shard.last,
                selection=selection,
                vocab_size=job.tokenizer.vocab_size,
                end_of_text=rule,
                dtype=dtype_for(job.tokenizer.vocab_size),
            )
            tasks.append(task)
    if not tasks:
        raise EmptySplitError(
            f"no document went to the {split} split of {job.output.path}; give more documents, or another "
            "--validation-fraction or --validation-input"
        )
    return _SplitPlan(tuple(tasks), empty_documents, tokens)


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


def _statistics(shards: Sequence[ShardRecord], plan: _SplitPlan) -> ImportStatistics:
    tokens = sum(shard.tokens for shard in shards)
    return ImportStatistics(
        documents=sum(shard.documents for shard in shards),
        tokens=tokens,
        shards=len(shards),
        empty_documents=plan.empty_documents,
        stripped_tokens=plan.tokens - tokens,
    )


def _check_nothing_lost(job: _Import, statistics: dict[str, ImportStatistics]) -> None:
    """Compares what the shards hold with what the indexes speak of."""
    documents = sum(counts.documents for counts in statistics.values())
    empty = sum(counts.empty_documents for counts in statistics.values())
    given = sum(dataset.documents for dataset in job.all_datasets)
    if documents + empty != given:
        raise DataError(
            f"output {job.output.path}: {documents:,} documents and {empty:,} empty ones are not the {given:,} of the "
            f"datasets; delete it and {job.output.partial}, and import again while nothing changes the datasets"
        )


def _compare(job: _Import) -> str:
    output = job.output.path
    if job.output.existing() is None:
        raise DataError(f"output {output} does not exist; import it first, without --check")
    statistics = {}
    for split in job.request.splits:
        manifest = read_manifest(output / split)
        plan = _plan(job, split)
        if len(plan.tasks) != len(manifest.shards):
            raise DataError(
                f"{output / split} has {len(manifest.shards):,} shards instead of {len(plan.tasks):,}; delete the "
                "output and import it again"
            )
        initialize = functools.partial(_comparer, output / split, manifest)
        pool: WorkerPool[tuple[int, ShardTask], int] = WorkerPool(initialize, job.options.workers, in_hand=1)
        shown = job.options.progress
        with pool, Progress(f"checking {split}", "shards", len(plan.tasks), shown=shown) as progress:
            for compared in pool.map(enumerate(plan.tasks)):
                progress.update(1, compared)
        statistics[split] = _statistics(manifest.shards, plan)
    _check_nothing_lost(job, statistics)
    documents, empty, tokens, shards = (
        sum(getattr(counts, name) for counts in statistics.values())
        for name in ("documents", "empty_documents", "tokens", "shards")
    )
    return (
        f"{tokens:,} tokens in {shards:,} shards of {output} are those of the datasets, "
        f"{documents:,} documents and {empty:,} empty ones left out"
    )


def _comparer(directory: Path, manifest: Manifest) -> Callable[[tuple[int, ShardTask]], int]:
    def compare(numbered: tuple[int, ShardTask]) -> int:
        index, task = numbered
        return compare_shard(task, directory, manifest, index)

    return compare
