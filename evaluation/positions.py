"""Loss by position over long documents (as in the paper's figures on PG19), and by position in the block."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluation.documents import DocumentChunks
from evaluation.plots import can_plot, figure
from evaluation.result import EvaluationResult
from evaluation.token_losses import token_losses
from parallel.stage import Stage


@dataclass(frozen=True)
class Estimate:
    """A mean over chunks and its standard error, NaN for a single chunk; chunks are taken as independent."""

    mean: float
    error: float

    @classmethod
    def over(cls, values: np.ndarray) -> "Estimate":
        """Of one value for each chunk."""
        error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return cls(float(values.mean()), error)

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + ("" if math.isnan(self.error) else f" +- {self.error:.4f}")

    def to_json(self) -> dict[str, float | None]:
        """As JSON knows it."""
        return {"mean": self.mean, "standard_error": None if math.isnan(self.error) else self.error}


@dataclass(frozen=True)
class Bin:
    """Positions first to last of a chunk, counted from 0."""

    first: int
    last: int
    loss: Estimate


@dataclass(frozen=True)
class PositionLoss(EvaluationResult):
    """Loss in nats per token by position; a chunk of S tokens, blocks of L (1 for vanilla models).

    Attributes:
        chunks: what was read.
        block_length: L.
        loss: mean over all predicted tokens.
        by_position: means of the positions L to S - 1; nothing predicts the first block.
        bins: ranges of positions, of whole blocks, about two an octave.
        gain: loss of the first quarter of the predicted blocks less that of the last: what a long context is worth.
        per_doubling: change of the loss with each doubling of the number of blocks before, by least squares.
        in_block: by position in the block; one value for vanilla models.
    """

    name = "positions"

    chunks: DocumentChunks
    block_length: int
    loss: Estimate
    by_position: tuple[float, ...]
    bins: tuple[Bin, ...]
    gain: Estimate
    per_doubling: Estimate
    in_block: tuple[Estimate, ...]

    @property
    def perplexity(self) -> float:
        """Per token."""
        return math.exp(self.loss.mean)

    def lines(self) -> list[str]:
        """See EvaluationResult."""
        lines = [
            self.chunks.describe(),
            f"loss                   {self.loss} nats per token",
            f"perplexity             {self.perplexity:.3f}",
            f"gain over the context  {self.gain} (first quarter of the positions less the last)",
            f"for each doubling      {self.per_doubling} (slope over the logarithm of the position)",
        ]
        lines += [f"positions {one.first:6,} - {one.last:6,}  {one.loss}" for one in self.bins]
        if self.block_length > 1:
            lines.append("by position in block   " + ", ".join(map(str, self.in_block)))
        return lines

    def scalars(self) -> dict[str, float]:
        """See EvaluationResult."""
        scalars = {
            "loss": self.loss.mean,
            "perplexity": self.perplexity,
            "gain": self.gain.mean,
            "per_doubling": self.per_doubling.mean,
        }
        if self.block_length > 1:
            scalars |= {f"in_block/{index}": one.mean for index, one in enumerate(self.in_block, start=1)}
        return scalars

    def to_json(self) -> dict[str, object]:
        """See EvaluationResult."""
        return {
            "chunk_length": self.chunks.length,
            "chunks": len(self.chunks),
            "available_chunks": self.chunks.available,
            "documents": self.chunks.documents,
            "too_short_documents": self.chunks.too_short,
            "left_over_tokens": self.chunks.left_over,
            "loss": self.loss.to_json(),
            "perplexity": self.perplexity,
            "gain": self.gain.to_json(),
            "per_doubling": self.per_doubling.to_json(),
            "bins": [{"first": one.first, "last": one.last, **one.loss.to_json()} for one in self.bins],
            "by_position_in_block": [one.to_json() for one in self.in_block],
            "first_position": self.block_length,
            "by_position": [round(value, 6) for value in self.by_position],
        }

    def draw(self, folder: Path) -> list[Path]:
        """See EvaluationResult."""
        if not can_plot():
            return []
        paths = [folder / "positions.png"]
        self._draw_positions(paths[0])
        if self.block_length > 1:
            paths.append(folder / "positions_in_block.png")
            self._draw_blocks(paths[1])
        return paths

    def _draw_positions(self, path: Path) -> None:
        blocks = np.array(self.by_position).reshape(-1, self.block_length).mean(axis=1)
        places = (np.arange(len(blocks)) + 1.5) * self.block_length
        centers = [math.sqrt(max(one.first, 1) * (one.last + 1)) for one in self.bins]
        with figure(path) as (_, [axis]):
            axis.plot(places, blocks, linewidth=0.5, alpha=0.4, label="each block" if self.block_length > 1 else "each")
            errors = [one.loss.error for one in self.bins]
            axis.errorbar(centers, [one.loss.mean for one in self.bins], errors, marker="o", markersize=3, label="bins")
            axis.set(xscale="log", xlabel="position (tokens)", ylabel="loss (nats per token)")
            axis.set_title(f"{len(self.chunks):,} chunks of {self.chunks.length:,} tokens")
            axis.legend()

    def _draw_blocks(self, path: Path) -> None:
        places = range(1, self.block_length + 1)
        with figure(path) as (_, [axis]):
            means, errors = [one.mean for one in self.in_block], [one.error for one in self.in_block]
            axis.errorbar(places, means, errors, marker="o", capsize=3)
            axis.set(xticks=list(places), xlabel="position in the block", ylabel="loss (nats per token)")


def evaluate_positions(stage: Stage, chunks: DocumentChunks, batch_tokens: int) -> PositionLoss:
    """Measures the loss of every token of all chunks.

    Args:
        stage: the whole model.
        chunks: text; whole blocks of the model.
        batch_tokens: tokens of a forward pass.
    """
    unit = stage.model_config.unit_length
    units = chunks.length // unit
    edges = bin_edges(units)
    device = next(stage.parameters()).device
    total = np.zeros(chunks.length - unit)
    rows: list[np.ndarray] = []
    for batch in chunks.batches(batch_tokens, device):
        losses = token_losses(stage, batch).double().cpu().numpy()
        total += losses.sum(axis=0)
        rows.append(_chunk_values(losses.reshape(len(losses), units - 1, unit), edges))
    bins = len(edges) - 1
    binned, trends, in_block = np.split(np.concatenate(rows), [bins, bins + 2], axis=1)
    estimates = [Estimate.over(column) for column in binned.T]
    return PositionLoss(
        chunks=chunks,
        block_length=unit,
        loss=Estimate.over(in_block.mean(axis=1)),
        by_position=tuple((total / len(chunks)).tolist()),
        bins=tuple(
            Bin(first * unit, stop * unit - 1, estimate)
            for (first, stop), estimate in zip(itertools.pairwise(edges), estimates, strict=True)
        ),
        gain=Estimate.over(trends[:, 0]),
        per_doubling=Estimate.over(trends[:, 1]),
        in_block=tuple(Estimate.over(column) for column in in_block.T),
    )


def bin_edges(units: int) -> list[int]:
    """Where bins of the units 1 to units - 1 begin, two an octave, and the end of the last one."""
    edges = {round(math.sqrt(2) ** half) for half in range(2 * units.bit_length())}
    return [*sorted(edge for edge in edges if edge < units), units]


def _chunk_values(losses: np.ndarray, edges: Sequence[int]) -> np.ndarray:
    """What is averaged over chunks, of each chunk's losses [chunks, units - 1, L].

    Returns:
        [chunks, bins + 2 + L]: means of bins; first quarter less last; slope per doubling; means by place in the block.
    """
    by_unit = losses.mean(axis=2)  # of the units 1 and on
    quarter = max(1, by_unit.shape[1] // 4)
    binned = [by_unit[:, first - 1 : stop - 1].mean(axis=1) for first, stop in itertools.pairwise(edges)]
    gain = by_unit[:, :quarter].mean(axis=1) - by_unit[:, -quarter:].mean(axis=1)
    doublings = np.log2(np.arange(1, by_unit.shape[1] + 1))
    doublings -= doublings.mean()
    # A chunk of two units has one predicted unit, and no slope.
    slope = by_unit @ doublings / max(float(doublings @ doublings), 1e-12)
    return np.concatenate((np.stack([*binned, gain, slope], axis=1), losses.mean(axis=1)), axis=1)
