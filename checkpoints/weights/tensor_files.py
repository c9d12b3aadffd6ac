"""Reads a folder of safetensors files as Hugging Face writes it, one file or shards with an index, tensor by tensor."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoints.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Types whose every value fp32 can hold, so that storing them in fp32 and back changes no bit.
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class TensorFiles:
    """The tensors of one folder, read only when asked for.

    Args:
        directory: holds `model.safetensors`, or shards and `model.safetensors.index.json`.

    Attributes:
        directory: the folder.
        shapes: shape of every tensor by its name.

    Raises:
        CheckpointError: there is no such folder or file, a file is damaged, or it is a pickle.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._opened: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        _check_directory(directory)
        if (directory / INDEX_FILE).is_file():
            self._read_index(directory / INDEX_FILE)
        else:
            self._add_file(SINGLE_FILE)

    def __enter__(self) -> Self:
        """Returns the reader."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the files."""
        self.close()

    def close(self) -> None:
        """Closes all files; reading opens them again."""
        for file in self._opened.values():
            file.__exit__(None, None, None)
        self._opened.clear()

    def dtype(self, name: str) -> torch.dtype:
        """Type in which a tensor is stored.

        Raises:
            CheckpointError: it is one that fp32 does not hold exactly, such as a quantized one.
        """
        stored = self._dtypes[name]
        if stored not in DTYPES:
            raise CheckpointError(
                f"{self.directory / self._file_of[name]} holds {name} as {stored}, which is not supported; "
                f"convert the weights to one of {', '.join(DTYPES)}"
            )
        return DTYPES[stored]

    def read(self, name: str) -> Tensor:
        """Reads one tensor in its own shape and type.

        Raises:
            CheckpointError: the folder does not hold it, or the file cannot be read.
        """
        if name not in self._file_of:
            raise CheckpointError(f"{self.directory} holds no tensor {name}")
        self.dtype(name)
        file_name = self._file_of[name]
        with _readable(self.directory / file_name):
            tensor: Tensor = self._open(file_name).get_tensor(name)
            return tensor

    def _open(self, file_name: str) -> Any:
        if file_name not in self._opened:
            self._opened[file_name] = safe_open(self.directory / file_name, framework="pt").__enter__()
        return self._opened[file_name]

    def _add_file(self, file_name: str) -> None:
        with _readable(self.directory / file_name):
            opened = self._open(file_name)
            names: list[str] = opened.keys()
            for name in names:
                part = opened.get_slice(name)
                self._file_of[name] = file_name
                self.shapes[name] = tuple(part.get_shape())
                self._dtypes[name] = part.get_dtype()

    def _read_index(self, index: Path) -> None:
        try:
            listed = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{index} is no index of safetensors files ({error}); fetch it again") from None
        for file_name in dict.fromkeys(listed.values()):
            if not isinstance(file_name, str) or Path(file_name).name != file_name:
                raise CheckpointError(f"{index} names {file_name}, which is not a file beside it; fetch it again")
            if not (self.directory / file_name).is_file():
                raise CheckpointError(f"{index} names {file_name}, which is missing; fetch it again")
            self._add_file(file_name)
        for name, file_name in listed.items():
            if self._file_of.get(name) != file_name:
                raise CheckpointError(f"{index} places {name} in {file_name}, which does not hold it; fetch both again")


def _check_directory(directory: Path) -> None:
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a folder; give the folder that holds {SINGLE_FILE}")
    if (directory / SINGLE_FILE).is_file() or (directory / INDEX_FILE).is_file():
        return
    pickles = sorted(path.name for pattern in PICKLES for path in directory.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{directory} holds {pickles[0]}, a pickle, which can run any code when it is read, and no {SINGLE_FILE}; "
            "convert it with safetensors where you trust it (model.save_pretrained of transformers does so)"
        )
    raise CheckpointError(f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); it may be cut short: fetch it again") from None
