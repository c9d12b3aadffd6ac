"""Weights to read, wherever they come from, under our parameter names: what conversion and uptraining read from.

`with open_vanilla_source(Path("pythia-160m")) as source:` gives `source.model`, `source.description`, `source.names`
and `source.read(name)`, one fp32 tensor at a time.
"""

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from checkpoints.errors import CheckpointError
from checkpoints.fragments import FragmentReader
from checkpoints.records import MANIFEST, read_manifest
from checkpoints.trained_model import TrainedModel, find_trained_model
from checkpoints.weights.huggingface_config import SPECIAL_TOKENS, family_of, model_from_huggingface
from checkpoints.weights.huggingface_names import huggingface_rules, ignored_tensors
from checkpoints.weights.parameter_shapes import parameter_shapes
from checkpoints.weights.reference_config import model_from_reference, read_reference_config
from checkpoints.weights.reference_names import ignored_tensors as ignored_reference_tensors
from checkpoints.weights.reference_names import reference_rules, vocabulary_size
from checkpoints.weights.tensor_files import INDEX_FILE, PICKLES, SINGLE_FILE, TensorFiles
from checkpoints.weights.weight_mapping import Rule, check_tensors, same
from parallel.config import ModelConfig

HUGGINGFACE_CONFIG = "config.json"
REFERENCE_CONFIG = "config.yaml"
BLOCK_MODEL_TYPE = "block_transformer"


class WeightSource(ABC):
    """Weights of one model under our names.

    Attributes:
        path: where they are.
        model: settings of the model.
        format: `ours`, `huggingface`, `block_transformer` or `reference`.
        shapes: global shape of each parameter, in the order of the model's pieces.
        details: what an export should keep: the family and the ids of special tokens.
    """

    def __init__(self, path: Path, model: ModelConfig, form: str, details: Mapping[str, Any]) -> None:
        self.path = path
        self.model = model
        self.format = form
        self.details = dict(details)
        self.shapes = parameter_shapes(model)

    @property
    def names(self) -> list[str]:
        """All parameters, in the order of the model's pieces."""
        return list(self.shapes)

    @property
    @abstractmethod
    def description(self) -> str:
        """What and where it is, in words."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """Reads one parameter, fp32 in its global shape.

        Raises:
            CheckpointError: there is none of that name, or the file cannot be read.
        """

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Type in which the parameter was stored first; fp32 holds its values exactly."""

    def main_dtype(self) -> torch.dtype:
        """The type that most parameters are stored in."""
        return Counter(self.dtype(name) for name in self.names).most_common(1)[0][0]

    @abstractmethod
    def close(self) -> None:
        """Closes all files."""

    def __enter__(self) -> Self:
        """Returns the source."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes all files."""
        self.close()

    def _checked_name(self, name: str) -> str:
        if name not in self.shapes:
            raise CheckpointError(f"{self.description} has no parameter {name}")
        return name


class MappedSource(WeightSource):
    """Tensors of another format, made ours by rules.

    Args:
        files: the folder.
        model: our settings of the model in it.
        form: name of the format.
        rules: the mapping, one rule for each of our parameters.
        ignored: patterns of tensors that may be there and are not read.
        details: what an export should keep.
        config: the format's own configuration.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape.
    """

    def __init__(
        self,
        files: TensorFiles,
        model: ModelConfig,
        form: str,
        rules: Sequence[Rule],
        ignored: Iterable[str],
        details: Mapping[str, Any],
        config: Mapping[str, Any],
    ) -> None:
        super().__init__(files.directory, model, form, details)
        self.files = files
        self.config = config
        check_tensors(str(files.directory), files.shapes, rules, ignored)
        self._rules = {rule.ours: rule for rule in rules}

    @property
    def description(self) -> str:
        """What and where it is, in words."""
        return f"{self.details.get('family', self.format)} model {self.path}"

    def read(self, name: str) -> Tensor:
        """Reads and packs one parameter; see WeightSource."""
        rule = self._rules[self._checked_name(name)]
        return rule.pack([self.files.read(theirs).float() for theirs in rule.theirs]).contiguous()

    def dtype(self, name: str) -> torch.dtype:
        """The widest type of the tensors that the parameter is made from."""
        dtypes = [self.files.dtype(theirs) for theirs in self._rules[self._checked_name(name)].theirs]
        return dtypes[0] if len(set(dtypes)) == 1 else torch.float32

    def close(self) -> None:
        """Closes all files."""
        self.files.close()


class CheckpointSource(WeightSource):
    """One of our checkpoints: of a run, or imported."""

    def __init__(self, trained: TrainedModel) -> None:
        source = read_manifest(trained.path).metadata.get("source") or {}
        super().__init__(trained.path, trained.model, "ours", source.get("details") or {})
        self.trained = trained
        self._dtype = str(source.get("dtype", "float32"))
        self._other_dtypes: dict[str, str] = source.get("other_dtypes") or {}
        self._reader = FragmentReader(trained.path)
        rules = [same(name, name, shape) for name, shape in self.shapes.items()]
        stored = {name: self._reader.global_shape(name) for name in self._reader.names("weight")}
        check_tensors(str(trained.path), stored, rules)

    @property
    def description(self) -> str:
        """What and where it is, in words."""
        return f"checkpoint {self.path}"

    def read(self, name: str) -> Tensor:
        """Reads one parameter; see WeightSource."""
        return self._reader.read_full(self._checked_name(name), "weight")

    def dtype(self, name: str) -> torch.dtype:
        """The type it had before it was imported; fp32 for what was trained here."""
        dtype: torch.dtype = getattr(torch, self._other_dtypes.get(name, self._dtype))
        return dtype

    def close(self) -> None:
        """Closes all files."""
        self._reader.close()


def open_weight_source(
    path: Path, reference_config: Path | None = None, sequence_length: int | None = None
) -> WeightSource:
    """Opens weights of any supported format, told apart by the files in the folder.

    Args:
        path: a Hugging Face folder, a folder of the reference code, an exported Block Transformer, one of our runs or
            one of its steps.
        reference_config: trainer YAML of the reference code; default `config.yaml` in the folder.
        sequence_length: tokens per sequence, instead of what the format's configuration says.

    Raises:
        CheckpointError: it is none of these, or not intact.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder; give a folder of weights, or a run such as runs/NAME")
    holds_weights = (path / SINGLE_FILE).is_file() or (path / INDEX_FILE).is_file()
    if (path / MANIFEST).is_file() or ((path / "checkpoints").is_dir() and not holds_weights):
        return CheckpointSource(find_trained_model(path))
    yaml_file = reference_config or path / REFERENCE_CONFIG
    if reference_config is not None or (yaml_file.is_file() and not (path / HUGGINGFACE_CONFIG).is_file()):
        return _open_reference(path, yaml_file, sequence_length)
    if (path / HUGGINGFACE_CONFIG).is_file():
        return _open_huggingface(path, sequence_length)
    if holds_weights:
        raise CheckpointError(
            f"{path} holds weights but no {HUGGINGFACE_CONFIG}; for a model of the reference code give its trainer "
            "YAML with --config"
        )
    if any(next(path.glob(pattern), None) for pattern in PICKLES):
        TensorFiles(path)  # says what is wrong with pickles
    return CheckpointSource(find_trained_model(path))


def open_vanilla_source(path: Path, sequence_length: int | None = None) -> WeightSource:
    """Opens the weights of a vanilla model, such as uptraining starts from; see open_weight_source.

    Raises:
        CheckpointError: it cannot be opened, or is a Block Transformer.
    """
    source = open_weight_source(path, sequence_length=sequence_length)
    if source.model.is_block:
        source.close()
        raise CheckpointError(f"{source.description} is a Block Transformer; give a vanilla model")
    return source


def _open_huggingface(path: Path, sequence_length: int | None) -> WeightSource:
    config = _read_json(path / HUGGINGFACE_CONFIG)
    if config.get("model_type") == BLOCK_MODEL_TYPE:
        return _open_exported(path, config)
    family = family_of(config)
    model = model_from_huggingface(config, sequence_length)
    details = {"family": family, **{name: config.get(name) for name in SPECIAL_TOKENS}}
    rules, ignored = huggingface_rules(model, family), ignored_tensors(model, family)
    return MappedSource(TensorFiles(path), model, "huggingface", rules, ignored, details, config)


def _open_exported(path: Path, config: Mapping[str, Any]) -> WeightSource:
    try:
        model = ModelConfig.model_validate(config.get("model"))
    except ValueError as error:
        raise CheckpointError(f"{path / HUGGINGFACE_CONFIG} describes no model of this version: {error}") from None
    rules = [same(name, name, shape) for name, shape in parameter_shapes(model).items()]
    return MappedSource(TensorFiles(path), model, BLOCK_MODEL_TYPE, rules, (), {}, config)


def _open_reference(path: Path, yaml_file: Path, sequence_length: int | None) -> WeightSource:
    config = read_reference_config(yaml_file)
    files = TensorFiles(path)
    given = (config["token_decoder"].get("config") or {}).get("vocab_size")
    model = model_from_reference(config, vocabulary_size(files.shapes) or given or 0, sequence_length)
    rules, ignored = reference_rules(model), ignored_reference_tensors(model)
    return MappedSource(files, model, "reference", rules, ignored, {}, config)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is no model configuration: it must be an object")
    return content
