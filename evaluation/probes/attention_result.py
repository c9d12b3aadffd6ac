"""Results of the attention probe.

N blocks (tokens for a vanilla model), T positions of a block in the token decoder, K context vectors.
"""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from evaluation.plots import HeatMap, can_plot, draw_heat_maps
from evaluation.result import EvaluationResult

# A figure with more panels cannot be read; layers in between are left out of it.
MAXIMUM_PANELS = 6


@dataclass(frozen=True)
class GlobalAttention:
    """One layer of the block decoder or of a vanilla model; means over text, and over heads if not told otherwise.

    Attributes:
        first_by_head: [heads], weight on the first block, from all later ones.
        by_distance: [N - 1], weight on the block so many before, the first block left out.
        corner: [up to 32, up to 32], weights between the first blocks.
    """

    first_by_head: Sequence[float]
    by_distance: Sequence[float]
    corner: Sequence[Sequence[float]]

    @property
    def first(self) -> float:
        """Weight on the first block, over all heads."""
        return float(np.mean(self.first_by_head))

    def shares(self, edges: Sequence[int]) -> list[float]:
        """How the attention of all blocks after the first one divides over distances from edge to edge."""
        weights = np.array(self.by_distance)
        # Of N - 1 blocks, so many have a block at that distance that is not the first one.
        weights *= np.arange(len(weights), 0, -1) / len(weights)
        return [float(weights[low:high].sum()) for low, high in itertools.pairwise(edges)]


@dataclass(frozen=True)
class LocalAttention:
    """One layer of the token decoder; means over text and heads.

    Attributes:
        positions: [T, T], weights of each position of a block on the others.
        context: [T, K], weights of each position on the context vectors, for cross-attention.
    """

    positions: Sequence[Sequence[float]]
    context: Sequence[Sequence[float]] | None


@dataclass(frozen=True)
class AttentionResult(EvaluationResult):
    """Mean attention weights by layer.

    Attributes:
        chunks: sequences they were measured on.
        chunk_length: tokens of each.
        leading_names: names of the positions of a block before its first token.
        everywhere: layers of the block decoder, or of a vanilla model.
        local: layers of the token decoder; none for a vanilla model.
    """

    name = "attention"

    chunks: int
    chunk_length: int
    leading_names: tuple[str, ...]
    everywhere: tuple[GlobalAttention, ...]
    local: tuple[LocalAttention, ...]

    @property
    def uniform_first(self) -> float:
        """Weight on the first block if each block attended to all up to itself alike."""
        size = len(self.everywhere[0].by_distance) + 1
        return float(np.mean([1 / (place + 1) for place in range(1, size)]))

    @property
    def prefix_shares(self) -> list[float]:
        """By layer: what positions that hold a token take from those before the first token."""
        leading = len(self.leading_names)
        maps = [np.array(layer.positions) for layer in self.local]
        return [float(one[leading:, :leading].sum(axis=1).mean()) for one in maps if len(one) > leading]

    @property
    def uniform_prefix(self) -> float:
        """The same if each position attended to all up to itself alike."""
        leading, size = len(self.leading_names), len(self.local[0].positions)
        return float(np.mean([leading / (place + 1) for place in range(leading, size)]))

    def lines(self) -> list[str]:
        """See EvaluationResult."""
        what = "blocks" if self.local else "tokens"
        edges, names = self._distances()
        lines = [
            f"{self.chunks:,} chunks of {self.chunk_length:,} tokens; share of attention on the first of the {what} "
            f"(uniform: {self.uniform_first:.3f}), and by distance",
            "layer   first" + "".join(f"{name:>9}" for name in names),
        ]
        for index, layer in enumerate(self.everywhere):
            shares = "".join(f"{share:9.3f}" for share in layer.shares(edges))
            lines.append(f"{index:5d}{layer.first:8.3f}{shares}")
        if self.prefix_shares:
            shares = " ".join(f"{share:.3f}" for share in self.prefix_shares)
            lines.append(
                f"token decoder, by layer: tokens give {shares} to {', '.join(self.leading_names)} "
                f"(uniform: {self.uniform_prefix:.3f})"
            )
        return lines

    def scalars(self) -> dict[str, float]:
        """Weight on the first block by layer, and on the prefix."""
        scalars = {f"first/layer_{index}": layer.first for index, layer in enumerate(self.everywhere)}
        return scalars | {f"prefix/layer_{index}": share for index, share in enumerate(self.prefix_shares)}

    def to_json(self) -> dict[str, object]:
        """See EvaluationResult."""
        return {
            "chunks": self.chunks,
            "chunk_length": self.chunk_length,
            "positions": self._position_names(),
            "uniform": {"first": self.uniform_first, "prefix": self.uniform_prefix if self.prefix_shares else None},
            "prefix": self.prefix_shares,
            "block_decoder" if self.local else "decoder": [asdict(layer) for layer in self.everywhere],
            "token_decoder": [asdict(layer) for layer in self.local],
        }

    def draw(self, folder: Path) -> list[Path]:
        """Heat maps."""
        if not can_plot():
            return []
        what, short = ("block decoder", "block") if self.local else ("decoder", "token")
        edges, names = self._distances()
        layers = [str(index) for index in range(len(self.everywhere))]
        shares = np.array([[layer.first, *layer.shares(edges)] for layer in self.everywhere])
        title = f"{what}: share of attention"
        sink = np.array([layer.first_by_head for layer in self.everywhere])
        heads = [str(index) for index in range(sink.shape[1])]
        by_distance = HeatMap(title, shares, layers, ["first", *names])
        first = HeatMap(f"{what}: weight on the first {short}", sink, layers, heads)
        places = [str(place) for place in range(len(self.everywhere[0].corner))]
        starts = [
            HeatMap(f"layer {index}", _causal(self.everywhere[index].corner), places, places)
            for index in _some(self.everywhere)
        ]
        paths = [
            draw_heat_maps(folder / "attention_distance.png", [by_distance], "layer", f"distance in {short}s"),
            draw_heat_maps(folder / "attention_first.png", [first], "layer", "head"),
            draw_heat_maps(folder / "attention_start.png", starts, f"from {short}", f"to {short}", logarithmic=True),
        ]
        return paths + self._draw_local(folder)

    def _draw_local(self, folder: Path) -> list[Path]:
        names = self._position_names()
        shown = [(f"layer {index}", self.local[index]) for index in _some(self.local)]
        maps = [HeatMap(title, _causal(layer.positions), names, names) for title, layer in shown]
        cross = [
            HeatMap(title, np.array(layer.context), names, [f"vector {k + 1}" for k in range(len(layer.context[0]))])
            for title, layer in shown
            if layer.context is not None
        ]
        paths = []
        if maps:
            paths.append(draw_heat_maps(folder / "attention_token_decoder.png", maps, "from", "to"))
        if cross:
            paths.append(draw_heat_maps(folder / "attention_context.png", cross, "from", "to context vector"))
        return paths

    def _distances(self) -> tuple[list[int], list[str]]:
        """Where ranges of distances begin, by powers of two, the end of the last one, and their names."""
        size = len(self.everywhere[0].by_distance)
        edges = [0, *(2**power for power in range(size.bit_length()) if 2**power < size), size]
        names = [f"{low}" if high == low + 1 else f"{low}-{high - 1}" for low, high in itertools.pairwise(edges)]
        return edges, names

    def _position_names(self) -> list[str]:
        if not self.local:
            return []
        tokens = len(self.local[0].positions) - len(self.leading_names)
        return [*self.leading_names, *(f"token {index + 1}" for index in range(tokens))]


def _some(layers: Sequence[object]) -> list[int]:
    """At most as many layers as a figure has room for, the first and the last among them."""
    count = min(len(layers), MAXIMUM_PANELS)
    return sorted({round(place * (len(layers) - 1) / max(1, count - 1)) for place in range(count)})


def _causal(weights: Sequence[Sequence[float]]) -> np.ndarray:
    """A square map, white where nobody may look."""
    return np.where(np.tri(len(weights), dtype=bool), np.array(weights), np.nan)
