"""Converts weights from any supported format to another and compares what both models compute.

The output appears as a whole or not at all: it is written under a temporary name, checked there, and renamed.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from checkpoints.errors import CheckpointError
from checkpoints.files import storage_error, write_durably
from checkpoints.fragments import write_fragments
from checkpoints.records import FileRecord, Fragment
from checkpoints.store import CheckpointStore
from checkpoints.trained_model import TOKENIZER_NAMES
from checkpoints.weights import modeling_block_transformer
from checkpoints.weights.conversion_check import Difference, compare
from checkpoints.weights.huggingface_config import huggingface_from_model
from checkpoints.weights.huggingface_names import huggingface_rules
from checkpoints.weights.reference_config import reference_from_model
from checkpoints.weights.reference_names import reference_rules, unused_tables
from checkpoints.weights.tensor_output import (
    MAXIMUM_FILE_BYTES,
    PlannedTensor,
    group_by_size,
    new_directory,
    write_tensors,
)
from checkpoints.weights.weight_mapping import Rule, same
from checkpoints.weights.weight_source import BLOCK_MODEL_TYPE, HUGGINGFACE_CONFIG, REFERENCE_CONFIG, WeightSource

TARGETS = ("ours", "huggingface", "reference")
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Conversion:
    """What to make of a source.

    Attributes:
        target: one of TARGETS.
        dtype: type of the written weights; None: the type each had when it was imported, fp32 for what was trained
            here. Not for `ours`, which is always fp32.
        tokenizer: file to put beside the weights.
        maximum_file_bytes: size of one file of weights; as much is held in memory.
    """

    target: str
    dtype: torch.dtype | None = None
    tokenizer: Path | None = None
    maximum_file_bytes: int = MAXIMUM_FILE_BYTES


def convert(source: WeightSource, output: Path, conversion: Conversion, progress: Progress) -> Difference:
    """Writes a source in another format; the topology of one process must be initialized.

    Args:
        source: what to convert.
        output: the new folder.
        conversion: into what.
        progress: is told, in a line, what has been done.

    Returns:
        How far the logits of both are apart.

    Raises:
        CheckpointError: the output exists, cannot be written, cannot hold the model, or computes something else; then
            nothing is left behind.
    """
    if conversion.target == "ours" and conversion.dtype is not None:
        raise CheckpointError("--dtype does not go with --to ours: our checkpoints are fp32; give it at the export")
    with new_directory(output) as folder:
        _WRITERS[conversion.target](source, folder, conversion, progress)
        _copy_tokenizer(folder, conversion.tokenizer)
        progress("comparing the logits of both models")
        return compare(source, folder, conversion.dtype)


def write_ours(source: WeightSource, folder: Path, conversion: Conversion, progress: Progress) -> None:
    """Writes weights as the layout-free checkpoint of step 0 in folder/checkpoints, file by file."""
    names = source.names
    sizes = [4 * torch.Size(source.shapes[name]).numel() for name in names]
    groups = group_by_size(sizes, conversion.maximum_file_bytes)
    store = CheckpointStore(folder / "checkpoints")
    temporary = store.begin(0)
    records: list[FileRecord] = []
    for number, group in enumerate(groups, 1):
        fragments = [_fragment(source, names[index]) for index in group]
        records.append(write_fragments(temporary / f"weights_{number:05d}.safetensors", fragments))
        del fragments
        progress(f"wrote file {number} of {len(groups)}")
    store.publish(0, temporary, records, _metadata(source))


def _fragment(source: WeightSource, name: str) -> tuple[Fragment, Tensor]:
    values = source.read(name).reshape(-1)
    return Fragment(name, "weight", source.shapes[name], None, 0, 0, 0, values.numel()), values


def _metadata(source: WeightSource) -> dict[str, Any]:
    main = source.main_dtype()
    dtypes = {name: source.dtype(name) for name in source.names}
    return {
        "config": {"model": source.model.model_dump(mode="json")},
        "source": {
            "format": source.format,
            "path": str(source.path),
            "dtype": dtype_name(main),
            "other_dtypes": {name: dtype_name(dtype) for name, dtype in dtypes.items() if dtype != main},
            "details": source.details,
        },
    }


def _write_huggingface(source: WeightSource, folder: Path, conversion: Conversion, progress: Progress) -> None:
    if source.model.is_block:
        _write_block_folder(source, folder, conversion, progress)
        return
    dtype = conversion.dtype or source.main_dtype()
    config = huggingface_from_model(source.model, dtype_name(dtype), source.details.get("family"), source.details)
    _write_json(folder / HUGGINGFACE_CONFIG, config)
    _write_mapped(source, folder, huggingface_rules(source.model, config["model_type"]), conversion)
    progress("wrote the weights")


def _write_block_folder(source: WeightSource, folder: Path, conversion: Conversion, progress: Progress) -> None:
    model = source.model.model_dump(mode="json")
    if source.model.embedder.has_encoder:
        model["embedder"]["encoder"] = source.model.embedder.roberta.model_dump(mode="json")
    config = {
        "architectures": [modeling_block_transformer.BlockTransformer.__name__],
        "model_type": BLOCK_MODEL_TYPE,
        "torch_dtype": dtype_name(conversion.dtype or source.main_dtype()),
        "model": model,
    }
    _write_json(folder / HUGGINGFACE_CONFIG, config)
    code = Path(modeling_block_transformer.__file__)
    shutil.copyfile(code, folder / code.name)
    rules = [same(name, name, shape) for name, shape in source.shapes.items()]
    _write_mapped(source, folder, rules, conversion)
    progress("wrote the weights and the modelling file")


def _write_reference(source: WeightSource, folder: Path, conversion: Conversion, progress: Progress) -> None:
    config = reference_from_model(source.model)
    write_durably(folder / REFERENCE_CONFIG, yaml.safe_dump(config, sort_keys=False))
    tables = unused_tables(source.model)
    _write_mapped(source, folder, reference_rules(source.model), conversion, zeros=tables)
    progress("wrote the weights")


def _write_mapped(
    source: WeightSource,
    folder: Path,
    rules: list[Rule],
    conversion: Conversion,
    zeros: dict[str, tuple[int, ...]] | None = None,
) -> None:
    """Writes their tensors for all rules, and tensors of zeros."""
    planned: list[PlannedTensor] = []
    places: dict[str, tuple[Rule, int]] = {}
    for rule in rules:
        dtype = conversion.dtype or source.dtype(rule.ours)
        for index, (name, shape) in enumerate(zip(rule.theirs, rule.their_shapes, strict=True)):
            planned.append(PlannedTensor(name, shape, dtype))
            places[name] = rule, index
    filler = conversion.dtype or source.main_dtype()
    planned += [PlannedTensor(name, shape, filler) for name, shape in (zeros or {}).items()]

    def read(name: str) -> Tensor:
        if name not in places:
            return torch.zeros((zeros or {})[name])
        rule, index = places[name]
        return rule.unpack(source.read(rule.ours))[index].clone()

    # The reference code looks for one file only.
    limit = conversion.maximum_file_bytes if zeros is None else sum(item.bytes for item in planned)
    write_tensors(folder, planned, read, limit)


def _copy_tokenizer(folder: Path, tokenizer: Path | None) -> None:
    if tokenizer is None:
        return
    name = next((name for name in TOKENIZER_NAMES if Path(name).suffix == tokenizer.suffix), None)
    if name is None or not tokenizer.is_file():
        raise CheckpointError(
            f"tokenizer {tokenizer} is no tokenizer.json and no SentencePiece .model; give such a file"
        )
    try:
        shutil.copyfile(tokenizer, folder / name)
    except OSError as error:
        raise storage_error(folder / name, error) from error


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a type as configurations write it, such as bfloat16."""
    return str(dtype).removeprefix("torch.")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_durably(path, json.dumps(content, indent=2) + "\n")


_WRITERS = {"ours": write_ours, "huggingface": _write_huggingface, "reference": _write_reference}
