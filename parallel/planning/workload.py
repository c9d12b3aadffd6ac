"""What is trained and how: all that memory and time follow from."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from parallel.component_config import DecoderConfig
from parallel.config import ModelConfig, ParallelConfig
from parallel.costs import PieceCost, pipeline_split
from parallel.structure import holds_own_blocks


@dataclass(frozen=True)
class Workload:
    """A training step of one layout.

    Attributes:
        model: the model.
        parallel: the layout that trains; sharding that would shard nothing is left out, as train.step.StepEngine does.
        micro_batch_size: sequences per forward pass of one process.
        num_micro_batches: of one process per optimizer step.
        precision: fp32, or bf16 with fp32 master weights and gradient accumulation.
        on_gpu: kernels of a GPU keep other tensors than those of a CPU.
        decays_all: the optimizer has one group of parameters instead of two.
    """

    model: ModelConfig
    parallel: ParallelConfig
    micro_batch_size: int
    num_micro_batches: int
    precision: Literal["fp32", "bf16"] = "bf16"
    on_gpu: bool = True
    decays_all: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "parallel", self.parallel.without_idle_sharding(self.precision))

    @property
    def value_bytes(self) -> int:
        """Bytes of a weight and of an activation."""
        return 2 if self.precision == "bf16" else 4

    @cached_property
    def stages(self) -> list[list[PieceCost]]:
        """The pieces of each pipeline stage."""
        return pipeline_split(self.model, self.parallel.pipeline)

    def in_flight(self, stage: int) -> int:
        """Micro-batches whose activations a stage holds at once under 1F1B."""
        return min(self.num_micro_batches, self.parallel.pipeline - stage)

    def stack(self, piece: str) -> DecoderConfig:
        """The decoder stack that a piece belongs to or, as an output, ends."""
        model = self.model
        if not model.is_block:
            return model.vanilla
        return model.tokens if piece.startswith("token_decoder") else model.blocks

    def is_whole(self, piece: str) -> bool:
        """Whether each tensor-parallel rank holds a piece whole and runs it on its own blocks."""
        return self.parallel.block_parallel and holds_own_blocks(piece)

    def shares(self, piece: str) -> int:
        """Processes that share a piece's matrices."""
        return 1 if self.is_whole(piece) else self.parallel.tensor

    def parameters(self, piece: PieceCost) -> int:
        """Values that a process holds of a piece, before ZeRO shards them."""
        return piece.parameters_held(self.parallel)

    def positions(self, piece: str) -> float:
        """Positions of a micro-batch that the matrices of a piece's layers are multiplied with on one process."""
        model = self.model
        if piece.startswith("token_decoder"):
            positions = self.micro_batch_size * model.num_blocks * model.local_length
            return positions / self.parallel.tensor if self.is_whole(piece) else positions
        return self.micro_batch_size * (model.num_blocks if model.is_block else model.sequence_length)

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.micro_batch_size * self.model.sequence_length
