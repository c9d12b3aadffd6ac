"""Whether two folders of weights hold the same model: the largest difference of their logits on random tokens."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from checkpoints.errors import CheckpointError
from checkpoints.weights.modeling_block_transformer import BlockTransformer
from checkpoints.weights.piecewise_forward import piecewise_logits
from checkpoints.weights.source_forward import huggingface_logits, reference_logits
from checkpoints.weights.weight_source import BLOCK_MODEL_TYPE, MappedSource, WeightSource, open_weight_source
from parallel.config import ModelConfig
from parallel.cpu_adaptation import compute_device

TOLERANCE = 1e-4
NUM_SEQUENCES = 2
NUM_TOKENS = 32
SEED = 20240604


@dataclass(frozen=True)
class Difference:
    """How far the logits of two models are apart, in fp32.

    Attributes:
        largest: the largest absolute difference.
        scale: the largest absolute logit of the source.
        tokens: how many tokens were compared.
    """

    largest: float
    scale: float
    tokens: int

    @property
    def relative(self) -> float:
        """The largest difference as part of the largest logit."""
        return self.largest / max(self.scale, torch.finfo(torch.float32).tiny)

    def __str__(self) -> str:
        return (
            f"largest logit difference {self.largest:.3g} on {self.tokens} random tokens, {self.relative:.2g} of the "
            f"largest logit {self.scale:.4g} (tolerance {TOLERANCE:g})"
        )


def compare(source: WeightSource, output: Path, dtype: torch.dtype | None = None) -> Difference:
    """Compares a source with what was made of it; the topology of one process must be initialized.

    Args:
        source: the source.
        output: the folder that was written.
        dtype: if given, the type that the weights were rounded to: the source's are rounded alike before the
            comparison, which asks for the right conversion and not for more digits than the type has.

    Raises:
        CheckpointError: the difference is above the tolerance, or the output cannot be read.
    """
    ids = random_tokens(source.model).to(compute_device())
    if dtype is None:
        expected = logits_of(source, ids)
    else:
        expected = piecewise_logits(source.model, lambda name: source.read(name).to(dtype).float(), ids)
    if not bool(expected.isfinite().all()):
        raise CheckpointError(
            f"{source.description} computes logits that are no numbers, so there is nothing to compare with: its "
            "weights are damaged, or too large for --dtype; nothing was kept"
        )
    with open_weight_source(output) as written:
        actual = logits_of(written, ids)
    difference = Difference(
        float((actual - expected).abs().max()), float(expected.abs().max()), expected.shape[:-1].numel()
    )
    # Written so that a difference that is no number fails.
    if not difference.relative <= TOLERANCE:
        raise CheckpointError(
            f"the written model computes something else than {source.description}: {difference}; nothing was kept"
        )
    return difference


@torch.no_grad()
def logits_of(source: WeightSource, token_ids: Tensor) -> Tensor:
    """Logits of a model, computed from its own files by code of its own format."""
    if not isinstance(source, MappedSource):
        return piecewise_logits(source.model, source.read, token_ids)
    if source.format == BLOCK_MODEL_TYPE:
        return BlockTransformer.from_pretrained(source.path).to(token_ids.device)(token_ids)
    forward = reference_logits if source.format == "reference" else huggingface_logits
    return forward(source.files, source.config, token_ids)


def random_tokens(model: ModelConfig) -> Tensor:
    """Seeded random ids [NUM_SEQUENCES, S] that fill whole blocks."""
    unit = model.unit_length
    length = min(max(2, math.ceil(NUM_TOKENS / unit)), model.sequence_length // unit) * unit
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(model.vocab_size, (NUM_SEQUENCES, length), generator=generator)
