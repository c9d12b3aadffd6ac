"""Turns text files into a directory of shards: all of it or, under the final name, nothing."""

import contextlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data.errors import DataError
from data.files import write_atomically
from data.manifest import FORMAT_VERSION, Manifest, ShardRecord, dtype_for, read_manifest, write_manifest
from data.preparation.documents import TEXT_FIELD
from data.preparation.inputs import check_no_file_twice, expand_inputs, identify
from data.preparation.output_directory import locked_directory, publish
from data.preparation.parallel_shards import remove_temporary_files
from data.preparation.phases import Job, make_shards
from data.preparation.records import (
    RECORD_NAME,
    REJECTED_NAME,
    SHOWN_REJECTIONS,
    PreparationRecord,
    PreparationRequest,
    PreparationSummary,
    RejectedDocument,
    SplitCounts,
    SplitStatistics,
    read_record,
)
from data.shards import check_sizes
from data.tokenizer import Tokenizer, load_tokenizer

DEFAULT_SHARD_TOKENS = 2**25


@dataclass(frozen=True)
class PreparationOptions:
    """What to prepare.

    Attributes:
        inputs: Text files, glob patterns or directories of the training split, and of the validation split if that is
            a fraction.
        output: Directory to make.
        tokenizer: Tokenizer file.
        validation_inputs: The same for the validation split.
        validation_fraction: Or: the share of documents, chosen by a hash of their text, that go to validation.
        workers: Number of tokenizer processes.
        shard_tokens: A shard ends with the document that reaches this number of tokens.
        text_field: Field of .jsonl or column of .parquet files that holds the text.
        on_malformed: Whether malformed input ends the preparation, or is counted and listed.
        min_tokens: Documents of fewer tokens are left out.
        shuffle_documents: Seed of the order of documents; none: the order of the input.
        remove_duplicates: Whether to keep only one of documents with equal text.
        progress: Whether to show progress.
    """

    inputs: tuple[Path, ...]
    output: Path
    tokenizer: Path
    validation_inputs: tuple[Path, ...] = ()
    validation_fraction: float = 0.0
    workers: int = 1
    shard_tokens: int = DEFAULT_SHARD_TOKENS
    text_field: str = TEXT_FIELD
    on_malformed: Literal["fail", "skip"] = "fail"
    min_tokens: int = 0
    shuffle_documents: int | None = None
    remove_duplicates: bool = False
    progress: bool = True


def prepare(options: PreparationOptions) -> PreparationSummary:
    """Tokenizes text files into shards.

    The output appears under its name only when complete; an interrupted run leaves `.NAME.partial` beside it, and the
    same call goes on from the shards finished there.

    Args:
        options: What to prepare.

    Returns:
        What the output directory holds.

    Raises:
        DataError: A bad option, input or tokenizer, a full disk, or an output directory with other content.
    """
    _check_options(options)
    partial = options.output.with_name(f".{options.output.name}.partial")
    try:
        inputs = expand_inputs(options.inputs, "--input")
        validation_inputs = expand_inputs(options.validation_inputs, "--validation-input")
        check_no_file_twice(inputs + validation_inputs)
        tokenizer = load_tokenizer(options.tokenizer)
        job = Job(
            inputs=inputs,
            validation_inputs=validation_inputs,
            tokenizer=tokenizer,
            request=_request(options, inputs, validation_inputs, tokenizer),
            partial=partial,
            workers=options.workers,
            progress=options.progress,
        )
        return _existing_summary(options.output, job.request) or _prepare_locked(options.output, job)
    except OSError as error:
        kept = "; finished shards are kept: free space or fix permissions and give the same command again"
        advice = kept if partial.exists() else "; free space or fix permissions"
        raise DataError(f"{error.filename or options.output}: {error.strerror}{advice}") from error


def _check_options(options: PreparationOptions) -> None:
    if not options.inputs:
        raise DataError("no input file was given; name at least one with --input")
    if options.validation_inputs and options.validation_fraction:
        raise DataError("--validation-input and --validation-fraction exclude each other; give one of them")
    if not 0 <= options.validation_fraction < 1:
        raise DataError(f"--validation-fraction {options.validation_fraction} must be at least 0 and below 1")
    for name, minimum in (("workers", 1), ("shard_tokens", 1), ("min_tokens", 0), ("shuffle_documents", 0)):
        value = getattr(options, name)
        if value is not None and value < minimum:
            raise DataError(f"--{name.replace('_', '-')} {value} must be at least {minimum}")


def _request(
    options: PreparationOptions, inputs: tuple[Path, ...], validation_inputs: tuple[Path, ...], tokenizer: Tokenizer
) -> PreparationRequest:
    return PreparationRequest(
        format_version=FORMAT_VERSION,
        tokenizer_fingerprint=tokenizer.fingerprint,
        inputs=tuple(identify(path) for path in inputs),
        validation_inputs=tuple(identify(path) for path in validation_inputs),
        validation_fraction=options.validation_fraction,
        shard_tokens=options.shard_tokens,
        text_field=options.text_field,
        on_malformed=options.on_malformed,
        min_tokens=options.min_tokens,
        shuffle_documents=options.shuffle_documents,
        remove_duplicates=options.remove_duplicates,
    )


def _existing_summary(output: Path, request: PreparationRequest) -> PreparationSummary | None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    record = read_record(output)
    if record is None:
        raise DataError(f"output {output} exists and was not made by this command; give another --output")
    if not record.request.is_continued_by(request):
        before, now = record.request.model_dump(), request.model_dump()
        changed = [name for name in now if before[name] != now[name]]
        raise DataError(
            f"output {output} was prepared from something else ({', '.join(changed)} differ); "
            "give another --output, or delete it first"
        )
    manifests = {split: read_manifest(output / split) for split in request.splits}
    for split, manifest in manifests.items():
        check_sizes(output / split, manifest)
    return _summary(output, manifests, record.statistics, already_prepared=True)


def _summary(
    output: Path, manifests: dict[str, Manifest], statistics: dict[str, SplitStatistics], already_prepared: bool
) -> PreparationSummary:
    first: list[str] = []
    with contextlib.suppress(FileNotFoundError), open(output / REJECTED_NAME, "rb") as file:
        for line, _ in zip(file, range(SHOWN_REJECTIONS), strict=False):
            first.append(RejectedDocument.model_validate_json(line).message)
    return PreparationSummary(output, manifests, statistics, already_prepared, tuple(first))


def _prepare_locked(output: Path, job: Job) -> PreparationSummary:
    with locked_directory(job.partial):
        # Another process may have finished it in the meantime.
        if (existing := _existing_summary(output, job.request)) is not None:
            shutil.rmtree(job.partial)
            return existing
        _keep_only_same_request(job.partial, job.request)
        try:
            shards = make_shards(job)
        except BaseException:
            if not job.has_finished_shards:
                shutil.rmtree(job.partial)  # Nothing in it is worth keeping.
            raise
        summary = _complete(output, job, shards)
        shutil.rmtree(job.partial)
        return summary


def _keep_only_same_request(partial: Path, request: PreparationRequest) -> None:
    record = read_record(partial)
    if record is None or not record.request.is_continued_by(request):
        for child in partial.iterdir():
            shutil.rmtree(child) if child.is_dir() else child.unlink()
    if record is None or record.request != request:
        write_atomically(partial / RECORD_NAME, PreparationRecord(request=request).model_dump_json(indent=1).encode())


def _complete(output: Path, job: Job, made: dict[str, tuple[list[ShardRecord], SplitCounts]]) -> PreparationSummary:
    """Adds all that is no shard, and gives the output its name."""
    remove_temporary_files(job.output)
    tokenizer = job.tokenizer
    tokenizer_file = f"tokenizer{tokenizer.path.suffix}"
    write_atomically(job.output / tokenizer_file, tokenizer.path.read_bytes())
    manifests, statistics = {}, {}
    for split, (shards, counts) in made.items():
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            tokenizer_file=tokenizer_file,
            tokenizer_fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            dtype=dtype_for(tokenizer.vocab_size),
            shards=tuple(shards),
        )
        if not shards:
            raise DataError(
                f"no document went to the {split} split of {output}; give more text, or another "
                "--validation-fraction or --validation-input"
            )
        write_manifest(job.output / split, manifest)
        manifests[split] = manifest
        statistics[split] = SplitStatistics(
            documents=manifest.documents, tokens=manifest.tokens, shards=len(shards), **counts.model_dump()
        )
    record = PreparationRecord(request=job.request, statistics=statistics)
    write_atomically(job.output / RECORD_NAME, record.model_dump_json(indent=1).encode())
    publish(job.output, output)
    return _summary(output, manifests, statistics, already_prepared=False)
