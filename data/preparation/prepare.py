"""Turns text files into a directory of shards: all of it or, under the final name, nothing."""

import contextlib
import fcntl
import functools
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydantic
import tqdm
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from data.errors import DataError
from data.files import fsync_path, sha256_of_file, write_atomically
from data.manifest import FORMAT_VERSION, Manifest, dtype_for, read_manifest, write_manifest
from data.preparation.documents import check_input_path, read_documents
from data.preparation.split_writer import SplitWriter
from data.preparation.workers import WorkerPool
from data.shards import check_sizes
from data.tokenizer import Tokenizer, load_tokenizer

RECORD_NAME = "preparation.json"
DEFAULT_SHARD_TOKENS = 2**25
BATCH_CHARACTERS = 2**20
BATCH_DOCUMENTS = 1024

Encoded = list[NDArray[np.uint32]]


@dataclass(frozen=True)
class PreparationOptions:
    """What to prepare.

    Attributes:
        inputs: Text files of the training split, and of the validation split if that is a fraction.
        output: Directory to make.
        tokenizer: Tokenizer file.
        validation_inputs: Text files of the validation split.
        validation_fraction: Or: the share of documents, chosen by a hash of their text, that go to validation.
        workers: Number of tokenizer processes.
        shard_tokens: A shard ends with the document that reaches this number of tokens.
        progress: Whether to show a progress bar, if on a terminal.
    """

    inputs: tuple[Path, ...]
    output: Path
    tokenizer: Path
    validation_inputs: tuple[Path, ...] = ()
    validation_fraction: float = 0.0
    workers: int = 1
    shard_tokens: int = DEFAULT_SHARD_TOKENS
    progress: bool = True


class InputRecord(BaseModel):
    """Identity of an input file, wherever it lies."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(..., description="File name without folder.")
    bytes: int = Field(..., description="Size.")
    sha256: str = Field(..., description="Checksum.")


class PreparationRequest(BaseModel):
    """Everything that the shards depend on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int = Field(..., description="Version of the shard layout.")
    tokenizer_fingerprint: str = Field(..., description="SHA-256 of the tokenizer file.")
    inputs: tuple[InputRecord, ...] = Field(..., description="Files given as --input.")
    validation_inputs: tuple[InputRecord, ...] = Field(..., description="Files given as --validation-input.")
    validation_fraction: float = Field(..., description="Share of documents that go to validation.")
    shard_tokens: int = Field(..., description="Tokens after which a shard ends.")


class PreparationRecord(BaseModel):
    """Contents of `preparation.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    request: PreparationRequest = Field(..., description="What was asked for.")
    characters: int = Field(default=0, description="Characters of all documents; 0 until complete.")
    empty_documents: int = Field(default=0, description="Documents without a single token, which were left out.")


@dataclass(frozen=True)
class PreparationSummary:
    """What lies in the output directory.

    Attributes:
        output: The directory.
        manifests: The splits' manifests by name.
        characters: Characters of all documents.
        empty_documents: Documents left out because they gave no token.
        already_prepared: Whether an earlier run had made it.
    """

    output: Path
    manifests: dict[str, Manifest]
    characters: int
    empty_documents: int
    already_prepared: bool

    def __str__(self) -> str:
        """Sums up in a few lines."""
        tokens = sum(manifest.tokens for manifest in self.manifests.values())
        lines = [f"already prepared: {self.output}" if self.already_prepared else f"prepared: {self.output}"]
        lines += [
            f"  {split}: {manifest.documents:,} documents, {manifest.tokens:,} tokens, {len(manifest.shards):,} shards"
            for split, manifest in self.manifests.items()
        ]
        lines.append(f"  {self.characters / max(tokens, 1):.3f} characters per token")
        if self.empty_documents:
            lines.append(f"  {self.empty_documents:,} documents gave no token and were left out")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Document:
    number: int
    split: str
    text: str


@dataclass(frozen=True)
class _Batch:
    documents: list[_Document]

    @property
    def texts(self) -> list[str]:
        return [document.text for document in self.documents]


@dataclass
class _Counters:
    characters: int = 0
    empty_documents: int = 0


def prepare(options: PreparationOptions) -> PreparationSummary:
    """Tokenizes text files into shards.

    The output appears under its name only when complete; an interrupted run leaves `.NAME.partial` beside it, and the
    same call goes on from the shards finished there.

    Args:
        options: What to prepare.

    Returns:
        What the output directory holds.

    Raises:
        DataError: A bad option, input or tokenizer, or an output directory with other content.
    """
    _check_options(options)
    try:
        tokenizer = load_tokenizer(options.tokenizer)
        request = _request(options, tokenizer)
        existing = _existing_summary(options.output, request)
        if existing is not None:
            return existing
        partial = options.output.with_name(f".{options.output.name}.partial")
        with _locked_directory(partial):
            _keep_only_same_request(partial, request)
            return _build(options, tokenizer, request, partial)
    except OSError as error:
        raise DataError(
            f"{error.filename or options.output}: {error.strerror}; free space or fix permissions"
        ) from error


def _check_options(options: PreparationOptions) -> None:
    if not options.inputs:
        raise DataError("no input file was given; name at least one with --input")
    if options.validation_inputs and options.validation_fraction:
        raise DataError("--validation-input and --validation-fraction exclude each other; give one of them")
    if not 0 <= options.validation_fraction < 1:
        raise DataError(f"--validation-fraction {options.validation_fraction} must be at least 0 and below 1")
    if options.workers < 1:
        raise DataError(f"--workers {options.workers} must be at least 1")
    if options.shard_tokens < 1:
        raise DataError(f"--shard-tokens {options.shard_tokens} must be at least 1")
    for path in options.inputs + options.validation_inputs:
        check_input_path(path)


def _request(options: PreparationOptions, tokenizer: Tokenizer) -> PreparationRequest:
    def identify(paths: Iterable[Path]) -> tuple[InputRecord, ...]:
        return tuple(
            InputRecord(name=path.name, bytes=path.stat().st_size, sha256=sha256_of_file(path)) for path in paths
        )

    return PreparationRequest(
        format_version=FORMAT_VERSION,
        tokenizer_fingerprint=tokenizer.fingerprint,
        inputs=identify(options.inputs),
        validation_inputs=identify(options.validation_inputs),
        validation_fraction=options.validation_fraction,
        shard_tokens=options.shard_tokens,
    )


def _read_record(directory: Path) -> PreparationRecord | None:
    with contextlib.suppress(OSError, pydantic.ValidationError):
        return PreparationRecord.model_validate_json((directory / RECORD_NAME).read_bytes())
    return None


def _existing_summary(output: Path, request: PreparationRequest) -> PreparationSummary | None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    record = _read_record(output)
    if record is None:
        raise DataError(f"output {output} exists and was not made by this command; give another --output")
    if record.request != request:
        before, now = record.request.model_dump(), request.model_dump()
        changed = [name for name in now if before[name] != now[name]]
        raise DataError(
            f"output {output} was prepared from something else ({', '.join(changed)} differ); "
            "give another --output, or delete it first"
        )
    manifests = {split: read_manifest(output / split) for split in _splits(request)}
    for split, manifest in manifests.items():
        check_sizes(output / split, manifest)
    return PreparationSummary(output, manifests, record.characters, record.empty_documents, already_prepared=True)


def _splits(request: PreparationRequest) -> list[str]:
    has_validation = request.validation_inputs or request.validation_fraction
    return ["train", "validation"] if has_validation else ["train"]


@contextlib.contextmanager
def _locked_directory(path: Path) -> Iterator[None]:
    """Makes a directory and keeps other preparations of the same output out."""
    path.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another process is preparing this output in {path}; wait for it or end it") from None
        except OSError:
            pass  # A file system without such locks: the user must not start the same preparation twice.
        yield
    finally:
        os.close(descriptor)


def _keep_only_same_request(partial: Path, request: PreparationRequest) -> None:
    record = _read_record(partial)
    if record is not None and record.request == request:
        return
    for child in partial.iterdir():
        shutil.rmtree(child) if child.is_dir() else child.unlink()
    write_atomically(partial / RECORD_NAME, PreparationRecord(request=request).model_dump_json(indent=1).encode())


def _build(
    options: PreparationOptions, tokenizer: Tokenizer, request: PreparationRequest, partial: Path
) -> PreparationSummary:
    tokenizer_file = f"tokenizer{options.tokenizer.suffix}"
    write_atomically(partial / tokenizer_file, options.tokenizer.read_bytes())
    dtype = dtype_for(tokenizer.vocab_size)
    writers = {split: SplitWriter(partial / split, dtype, options.shard_tokens) for split in _splits(request)}
    try:
        counters = _write_shards(options, tokenizer, writers)
    except BaseException:
        _abandon(writers, partial)
        raise
    manifests = {}
    for split, writer in writers.items():
        manifests[split] = _manifest(tokenizer, tokenizer_file, dtype, writer, options, split)
        write_manifest(partial / split, manifests[split])
    record = PreparationRecord(
        request=request, characters=counters.characters, empty_documents=counters.empty_documents
    )
    write_atomically(partial / RECORD_NAME, record.model_dump_json(indent=1).encode())
    _publish(partial, options.output)
    return PreparationSummary(
        options.output, manifests, counters.characters, counters.empty_documents, already_prepared=False
    )


def _abandon(writers: dict[str, SplitWriter], partial: Path) -> None:
    """Keeps finished shards for the next run; without any, nothing is worth keeping."""
    for writer in writers.values():
        writer.abandon()
    if not any(writer.shards for writer in writers.values()):
        shutil.rmtree(partial)


def _manifest(
    tokenizer: Tokenizer, tokenizer_file: str, dtype: str, writer: SplitWriter, options: PreparationOptions, split: str
) -> Manifest:
    if not writer.shards:
        raise DataError(
            f"no document went to the {split} split of {options.output}; give more text, or another "
            "--validation-fraction or --validation-input"
        )
    return Manifest(
        format_version=FORMAT_VERSION,
        tokenizer_file=tokenizer_file,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        dtype=dtype,
        shards=tuple(writer.shards),
    )


def _publish(partial: Path, output: Path) -> None:
    try:
        os.rename(partial, output)  # Fails if the output has come into being meanwhile, unless it is empty.
    except OSError as error:
        raise DataError(f"output {output} cannot be made ({error.strerror}); the shards are in {partial}") from None
    fsync_path(output.parent)


def _write_shards(options: PreparationOptions, tokenizer: Tokenizer, writers: dict[str, SplitWriter]) -> _Counters:
    counters = _Counters()
    total = sum(path.stat().st_size for path in options.inputs + options.validation_inputs)
    pool: WorkerPool[_Batch, Encoded] = WorkerPool(functools.partial(_encoder, tokenizer.path), options.workers)
    with pool, tqdm.tqdm(total=total, unit="B", unit_scale=True, disable=None if options.progress else True) as bar:
        documents = _unfinished(_documents(options, bar.update), writers, counters)
        for batch, encoded in pool.map(_batches(documents)):
            for document, tokens in zip(batch.documents, encoded, strict=True):
                if len(tokens):
                    writers[document.split].add(document.number, tokens)
                else:
                    counters.empty_documents += 1
    for writer in writers.values():
        writer.finish()
    return counters


def _encoder(tokenizer_path: Path) -> Callable[[_Batch], Encoded]:
    tokenizer = load_tokenizer(tokenizer_path)
    return lambda batch: [np.asarray(ids, dtype=np.uint32) for ids in tokenizer.encode_batch(batch.texts)]


def _documents(options: PreparationOptions, progress: Callable[[int], object]) -> Iterator[_Document]:
    number = 0
    for split, paths in (("train", options.inputs), ("validation", options.validation_inputs)):
        for path in paths:
            for text in read_documents(path, progress):
                chosen = "validation" if _is_validation(text, options.validation_fraction) else split
                yield _Document(number, chosen, text)
                number += 1


def _is_validation(text: str, fraction: float) -> bool:
    if not fraction:
        return False
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return int.from_bytes(digest[:8]) < fraction * 2**64


def _unfinished(
    documents: Iterable[_Document], writers: dict[str, SplitWriter], counters: _Counters
) -> Iterator[_Document]:
    """Counts all documents and leaves out those that finished shards of an earlier run hold."""
    for document in documents:
        counters.characters += len(document.text)
        if document.number > writers[document.split].resume_after:
            yield document


def _batches(documents: Iterable[_Document]) -> Iterator[_Batch]:
    batch: list[_Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield _Batch(batch)
            batch, characters = [], 0
    if batch:
        yield _Batch(batch)
