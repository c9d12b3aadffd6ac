"""Turns text files into a directory of shards: all of it or, under the final name, nothing."""

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data.errors import DataError
from data.files import write_atomically
from data.manifest import FORMAT_VERSION, Manifest, dtype_for, read_manifest, write_manifest
from data.preparation.documents import TEXT_FIELD
from data.preparation.inputs import check_no_file_twice, expand_inputs, identify
from data.preparation.output_directory import EmptySplitError, OutputDirectory, partial_path, resolve_output
from data.preparation.parallel_shards import remove_temporary_files
from data.preparation.phases import Job, make_shards
from data.preparation.records import (
    REJECTED_NAME,
    SHOWN_REJECTIONS,
    PreparationRecord,
    PreparationRequest,
    PreparationSummary,
    RejectedDocument,
    SplitStatistics,
)
from data.preparation.requests import check_at_least, check_validation_options
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
    output = resolve_output(options.output)
    try:
        inputs, validation_inputs = _find_inputs(options, output)
        tokenizer = load_tokenizer(options.tokenizer)
        request = _request(options, inputs, validation_inputs, tokenizer)
        directory = OutputDirectory(output, request, PreparationRecord)
        job = Job(
            inputs=inputs,
            validation_inputs=validation_inputs,
            tokenizer=tokenizer,
            request=request,
            partial=directory.partial,
            workers=options.workers,
            progress=options.progress,
        )
        record, already_prepared = directory.make(lambda: _build(output, job))
        return _summary(output, record, already_prepared)
    except OSError as error:
        kept = "; finished shards are kept: free space or fix permissions and give the same command again"
        advice = kept if partial_path(output).exists() else "; free space or fix permissions"
        raise DataError(f"{error.filename or output}: {error.strerror}{advice}") from error


def _check_options(options: PreparationOptions) -> None:
    if not options.inputs:
        raise DataError("no input file was given; name at least one with --input")
    check_validation_options(options.validation_inputs, options.validation_fraction)
    check_at_least(options, {"workers": 1, "shard_tokens": 1, "min_tokens": 0, "shuffle_documents": 0})


def _find_inputs(options: PreparationOptions, output: Path) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    train = expand_inputs(options.inputs, "--input", output)
    validation = expand_inputs(options.validation_inputs, "--validation-input", output)
    check_no_file_twice(train.files + validation.files)
    left_out = train.left_out + validation.left_out
    if left_out and options.progress:
        counted = ", ".join(f"{count:,} {ending}" for ending, count in sorted(left_out.items()))
        print(f"left out files of unknown kinds: {counted}", file=sys.stderr)
    return train.files, validation.files


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


def _build(output: Path, job: Job) -> PreparationRecord:
    """Makes the shards and all that is no shard."""
    made = make_shards(job)
    remove_temporary_files(job.output)
    tokenizer = job.tokenizer
    tokenizer_file = f"tokenizer{tokenizer.path.suffix}"
    write_atomically(job.output / tokenizer_file, tokenizer.path.read_bytes())
    statistics = {}
    for split, (shards, counts) in made.items():
        if not shards:
            raise EmptySplitError(
                f"no document went to the {split} split of {output}; give more text, or another "
                "--validation-fraction or --validation-input"
            )
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            tokenizer_file=tokenizer_file,
            tokenizer_fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            dtype=dtype_for(tokenizer.vocab_size),
            shards=tuple(shards),
        )
        write_manifest(job.output / split, manifest)
        statistics[split] = SplitStatistics(
            documents=manifest.documents, tokens=manifest.tokens, shards=len(shards), **counts.model_dump()
        )
    return PreparationRecord(request=job.request, statistics=statistics)


def _summary(output: Path, record: PreparationRecord, already_prepared: bool) -> PreparationSummary:
    first: list[str] = []
    with contextlib.suppress(FileNotFoundError), open(output / REJECTED_NAME, "rb") as file:
        for line, _ in zip(file, range(SHOWN_REJECTIONS), strict=False):
            first.append(RejectedDocument.model_validate_json(line).message)
    manifests = {split: read_manifest(output / split) for split in record.request.splits}
    return PreparationSummary(output, manifests, record.statistics, already_prepared, tuple(first))
