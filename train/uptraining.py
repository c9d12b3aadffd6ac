"""Uptraining (paper section 3.7): a vanilla model's weights, and a fraction of the full schedule."""

import itertools
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed
from pydantic import ValidationError

from checkpoints.files import write_durably
from checkpoints.trained_model import TOKENIZER_NAMES
from checkpoints.uptraining.block_growth import GrownSource
from checkpoints.uptraining.initial_weights import UptrainedSource, UptrainingOptions
from checkpoints.weights.conversion import Conversion, write_ours
from checkpoints.weights.tensor_output import new_directory
from checkpoints.weights.weight_source import CheckpointSource, WeightSource, open_vanilla_source, open_weight_source
from data.errors import DataError
from data.streaming.corpus_tokenizer import tokenizer_file
from data.tokenizer import Tokenizer, load_tokenizer
from inference.errors import InferenceError
from inference.tokenizer_choice import tokenizer_of
from parallel.errors import ConfigurationError
from parallel.topology import start_single_process
from train.config import RunConfig
from train.config_file import explain

FOLDER = "initial_weights"
RECORD = "uptraining.json"
# Cut into tokens by both tokenizers; words, numbers, punctuation, capitals, other scripts and white space.
SAMPLE = 'It was 1812; "Who\'s there?" asked the Count.\n\tÉté, naïve, 漢字 -- 3.14159 x (2 + 2) = ?  END'


def uptraining_runs(config: RunConfig, fraction: float, block_lengths: Sequence[int] = ()) -> list[RunConfig]:
    """The runs of an uptraining, one per block length; the last has the config's name and length.

    Args:
        config: the target, with its full schedule.
        fraction: part of the full schedule's steps for all runs together.
        block_lengths: lengths to grow through, up to the config's own; empty: only that.

    Raises:
        ConfigurationError: a value does not fit.
    """
    if not 0 < fraction <= 1:
        raise ConfigurationError(f"--fraction {fraction} is not above 0 and at most 1; the paper uses 0.1")
    lengths = list(block_lengths or [config.model.block_length])
    _check_growth(lengths, config.model.block_length)
    steps = round(config.train.steps * fraction)
    share = steps // len(lengths)
    runs = []
    for number, length in enumerate(lengths):
        is_last = number == len(lengths) - 1
        name = config.run.name if is_last else f"{config.run.name}.blocks_of_{length}"
        folder = config.run.root / name / FOLDER
        changes: dict[str, dict[str, Any]] = {
            "run": {"name": name, "initial_weights": str(folder)},
            "model": {"block_length": length},
            "train": {"steps": steps - share * number if is_last else share},
        }
        runs.append(_changed(config, changes, fraction))
    return runs


def _check_growth(lengths: Sequence[int], last: int) -> None:
    given = f"--block-lengths {','.join(map(str, lengths))}"
    if lengths[-1] != last or sorted(set(lengths)) != lengths:
        raise ConfigurationError(f"{given} does not grow up to model.block_length={last}; end with that")
    for shorter, longer in itertools.pairwise(lengths):
        if longer % shorter:
            raise ConfigurationError(
                f"{given} grows from {shorter} to {longer}, which is no multiple; choose lengths of which each divides "
                "the next"
            )


def _changed(config: RunConfig, changes: dict[str, dict[str, Any]], fraction: float) -> RunConfig:
    values = config.model_dump(mode="json")
    for section, fields in changes.items():
        values[section] |= fields
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigurationError(
            f"{fraction:g} of the schedule's {config.train.steps} steps: {explain(error)}; change --fraction, "
            "--block-lengths or these values"
        ) from None


def check_source(vanilla: Path, config: RunConfig, options: UptrainingOptions) -> list[tuple[str, str]]:
    """Checks that vanilla weights fit the first run's model and data; reads no weights.

    Returns:
        Each parameter and where it comes from.

    Raises:
        CheckpointError: the weights cannot be opened or do not fit.
        ConfigurationError: the data was made with another tokenizer.
    """
    with open_vanilla_source(vanilla, config.model.sequence_length) as source:
        origins = list(UptrainedSource(source, config.model, options).origins())
        _check_tokenizer(source, config)
    return origins


def _check_tokenizer(vanilla: WeightSource, config: RunConfig) -> None:
    theirs = _tokenizer_of(vanilla)
    if theirs is None:
        print(f"note: {vanilla.description} comes without a tokenizer; it is not compared with that of the data")
        return
    data = config.data
    ours = load_tokenizer(tokenizer_file(data))
    if theirs.encode(SAMPLE) != ours.encode(SAMPLE):
        raise ConfigurationError(
            f"{vanilla.description} has the tokenizer {theirs.path}, the data was made with another "
            f"({ours.path}): the same text has other token ids; prepare the data with {theirs.path}"
        )


def _tokenizer_of(vanilla: WeightSource) -> Tokenizer | None:
    folder, data = vanilla.path, None
    if isinstance(vanilla, CheckpointSource):
        folder, data = vanilla.trained.folder, vanilla.trained.data
    with suppress(InferenceError, DataError):
        if data is not None:
            return tokenizer_of(vanilla.model, data)
        found = next((folder / name for name in TOKENIZER_NAMES if (folder / name).is_file()), None)
        return load_tokenizer(found) if found else None
    return None


def prepare_initial_weights(
    runs: Sequence[RunConfig],
    number: int,
    vanilla: Path,
    options: UptrainingOptions,
    progress: Callable[[str], None],
) -> None:
    """Makes the weights that a run of an uptraining starts from, unless they are there already.

    Args:
        runs: all runs of the uptraining; those before `number` are complete.
        number: the run to prepare.
        vanilla: where the vanilla weights are.
        options: how they are used.
        progress: is told, in a line, what has been done.

    Raises:
        CheckpointError: weights cannot be read, do not fit or cannot be written.
        ConfigurationError: there are weights already, made in another way.
    """
    config = runs[number]
    folder = config.directory / FOLDER
    made_from: dict[str, Any] = {"vanilla": str(vanilla), **asdict(options)}
    if number:
        made_from["previous"] = str(runs[number - 1].directory)
    if folder.is_dir():
        _check_record(folder, made_from)
        return
    if number:
        with open_weight_source(runs[number - 1].directory) as shorter:
            _write(GrownSource(shorter, config.model), folder, made_from, progress)
    else:
        with open_vanilla_source(vanilla, config.model.sequence_length) as source:
            _write(UptrainedSource(source, config.model, options), folder, made_from, progress)


def _write(
    source: UptrainedSource | GrownSource, folder: Path, made_from: dict[str, Any], progress: Callable[[str], None]
) -> None:
    progress(f"making the initial weights in {folder}")
    # Computed token embeddings run layers of the vanilla model.
    start_single_process()
    try:
        with new_directory(folder) as temporary:
            write_ours(source, temporary, Conversion("ours"), progress)
            record = {**made_from, "read_from": str(source.path), "origins": dict(source.origins())}
            write_durably(temporary / RECORD, json.dumps(record, indent=1) + "\n")
    finally:
        torch.distributed.destroy_process_group()


def _check_record(folder: Path, made_from: dict[str, Any]) -> None:
    try:
        recorded = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ConfigurationError(
            f"{folder} holds no readable {RECORD}; delete that folder to make the initial weights again"
        ) from None
    changed = [
        f"{name} is {recorded.get(name)!r} there and {value!r} here"
        for name, value in made_from.items()
        if recorded.get(name) != value
    ]
    if changed:
        raise ConfigurationError(
            f"{folder} was made in another way: {'; '.join(changed)}; choose another run.name or restore these values"
        )
