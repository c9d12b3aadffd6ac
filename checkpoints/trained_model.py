"""Finds a trained model on disk and loads it as one stage, whatever layout wrote it."""

from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from checkpoints.engine_state import load_weights
from checkpoints.errors import CheckpointError
from checkpoints.fragments import FragmentReader
from checkpoints.records import MANIFEST
from checkpoints.store import CheckpointStore, verify_checkpoint
from data.config import DataConfig
from parallel.config import ModelConfig, ParallelConfig
from parallel.stage import Stage, build_stage

TOKENIZER_NAMES = ("tokenizer.json", "tokenizer.model")


class _SavedConfig(BaseModel):
    """The sections of a run's configuration that describe its model; the others are not read."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model: ModelConfig
    data: DataConfig | None = None


@dataclass(frozen=True)
class TrainedModel:
    """A checkpoint of a run, found and verified but not loaded.

    Attributes:
        path: The step directory.
        step: Optimizer step.
        model: Settings of the model.
        data: What it was trained on; None if it was imported.
        skipped: Newer steps that were passed over, each with the reason.
    """

    path: Path
    step: int
    model: ModelConfig
    data: DataConfig | None
    skipped: tuple[tuple[int, str], ...] = ()

    @property
    def folder(self) -> Path:
        """The run's folder, or that of the import."""
        return self.path.parent.parent

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer that was imported with the weights, if any."""
        if self.data is not None:
            return None
        found = (self.folder / name for name in TOKENIZER_NAMES)
        return next((path for path in found if path.is_file()), None)

    def load(self, parallel: ParallelConfig | None = None, dtype: torch.dtype = torch.float32) -> Stage:
        """Builds this rank's stage with the stored weights, for inference; the topology must be initialized.

        Args:
            parallel: The layout; by default one process.
            dtype: Type of the weights.

        Raises:
            CheckpointError: A parameter is missing or has another shape.
        """
        stage = build_stage(self.model, parallel or ParallelConfig(), dtype, seed=None)
        with FragmentReader(self.path) as reader:
            load_weights(stage, reader)
        return stage.eval()


def find_trained_model(path: Path) -> TrainedModel:
    """Finds a model; needs no process group.

    Args:
        path: A run's folder or its `checkpoints/` folder, for the newest intact step; or one step directory.

    Raises:
        CheckpointError: There is no checkpoint, none is intact, or it was written by something else.
    """
    if not path.is_dir():
        raise CheckpointError(
            f"checkpoint {path} is not a folder; give a run's folder such as runs/NAME, or one of its "
            "checkpoints/step_*"
        )
    if (path / MANIFEST).is_file():
        manifest = verify_checkpoint(path)
        return _trained_model(path, manifest.step, manifest.metadata)
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    newest = CheckpointStore(root).newest()
    if newest is None:
        raise CheckpointError(
            f"{root} holds no checkpoint; give a run's folder such as runs/NAME, or one of its checkpoints/step_*"
        )
    return _trained_model(newest.path, newest.step, newest.metadata, newest.skipped)


def _trained_model(
    path: Path, step: int, metadata: dict[str, object], skipped: tuple[tuple[int, str], ...] = ()
) -> TrainedModel:
    try:
        config = _SavedConfig.model_validate(metadata.get("config"))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(("config", *map(str, first["loc"])))
        raise CheckpointError(
            f"{path} records no usable configuration ({name}: {first['msg'].lower()}); use a checkpoint written by "
            "tools/pretrain.py or tools/convert_checkpoint.py of this version"
        ) from None
    return TrainedModel(path, step, config.model, config.data, skipped)
