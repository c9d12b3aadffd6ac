"""Which tokenizer a corpus was made with."""

from pathlib import Path

from data.config import DataConfig
from data.errors import DataError, MissingFileError
from data.files import sha256_of_file
from data.manifest import MANIFEST_NAME, Manifest, parse_manifest
from data.streaming.corpus_files import CorpusFiles, open_corpus


def tokenizer_file(config: DataConfig) -> Path:
    """Finds the tokenizer file of a run's data; all its sources have the same.

    Args:
        config: Settings of the data.

    Returns:
        The file.

    Raises:
        DataError: The data is not there, or its tokenizer is missing or another one.
    """
    source = next(iter(config.corpora.values()))
    files = open_corpus(source.path, config.cache)
    return tokenizer_of(config, files, manifest_of(files, "train"))


def manifest_of(files: CorpusFiles, split: str) -> Manifest:
    """Reads the manifest of a split.

    Args:
        files: The corpus.
        split: Name of the split.

    Returns:
        The manifest.

    Raises:
        DataError: There is no such split, or its manifest is damaged.
    """
    try:
        path = files.metadata(f"{split}/{MANIFEST_NAME}")
    except MissingFileError as error:
        option = "--validation-input or --validation-fraction" if split == "validation" else "--input"
        raise DataError(
            f"{files.location} has no {split} split: {split}/{MANIFEST_NAME} is missing; prepare it with "
            f"tools/prepare_data.py and {option}"
        ) from error
    return parse_manifest(path)


def tokenizer_of(config: DataConfig, files: CorpusFiles, manifest: Manifest) -> Path:
    """Finds the tokenizer file of a corpus.

    Args:
        config: Names another copy of it, perhaps.
        files: The corpus.
        manifest: One of its splits.

    Returns:
        The file, which is the one that the shards were made with.

    Raises:
        DataError: It is missing or another one.
    """
    path = config.tokenizer or files.metadata(manifest.tokenizer_file)
    if not path.is_file():
        raise DataError(f"tokenizer {path} does not exist; give data.tokenizer, or prepare the data again")
    fingerprint = sha256_of_file(path)
    if fingerprint != manifest.tokenizer_fingerprint:
        raise DataError(
            f"tokenizer {path} has fingerprint {fingerprint}, but the shards in {files.location} were made with "
            f"{manifest.tokenizer_fingerprint}; give that tokenizer, or prepare the data again with this one"
        )
    return path
