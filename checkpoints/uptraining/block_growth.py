"""Weights of a Block Transformer with longer blocks, made from one with shorter blocks.

Progressive uptraining (left as future work in the paper's appendix B): from blocks of one token, where the model is
nearest to the vanilla one, to longer blocks in stages.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from checkpoints.errors import CheckpointError
from checkpoints.weights.weight_source import WeightSource
from parallel.config import ModelConfig


class GrownSource(WeightSource):
    """The same weights for longer blocks.

    The embedder becomes the mean of what it made of the block's parts. A token decoder that had no embedding table, as
    with one token per block, takes the embedder's.

    Args:
        shorter: the trained model; stays the caller's to close.
        target: its settings with a larger block_length.

    Raises:
        CheckpointError: the models differ in more than the length, or it is no multiple.
    """

    def __init__(self, shorter: WeightSource, target: ModelConfig) -> None:
        super().__init__(shorter.path, target, "grown", {})
        self.shorter = shorter
        length = shorter.model.block_length
        if target.block_length % length:
            raise CheckpointError(
                f"block_length={target.block_length} is no multiple of {length}, that of {shorter.description}; choose "
                "stages of which each divides the next"
            )
        if target.model_copy(update={"block_length": length}) != shorter.model:
            raise CheckpointError(f"{shorter.description} differs from the target in more than block_length")
        self.factor = target.block_length // length

    @property
    def description(self) -> str:
        """What and where it is, in words."""
        return f"{self.shorter.description} for blocks of {self.model.block_length}"

    def dtype(self, name: str) -> torch.dtype:
        """All fp32."""
        return torch.float32

    def close(self) -> None:
        """Nothing of its own is open."""

    def read(self, name: str) -> Tensor:
        """Computes one parameter; see WeightSource."""
        if self._checked_name(name) not in self.shorter.shapes:
            return self.shorter.read("embedder.embedding.weight")
        values = self.shorter.read(name)
        if name == "embedder.projection.weight":
            return values.repeat(1, self.factor) / self.factor
        if values.shape != self.shapes[name]:  # the expansion to as many vectors as the block has tokens
            return values.repeat(self.factor, *(1 for _ in values.shape[1:]))
        return values

    def origins(self) -> Iterator[tuple[str, str]]:
        """Every parameter with its origin."""
        for name in self.names:
            if name not in self.shorter.shapes:
                yield name, "embedder.embedding.weight"
            elif name == "embedder.projection.weight":
                yield name, f"{name}, mean of {self.factor} parts"
            else:
                yield name, name
