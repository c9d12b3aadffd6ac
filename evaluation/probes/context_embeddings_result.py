"""Results of the nearest-token probe of context embeddings; L block length."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from evaluation.plots import can_plot, figure
from evaluation.result import EvaluationResult


@dataclass(frozen=True)
class NearestTokens:
    """How often the token nearest to one vector is in the blocks around.

    Attributes:
        current: [L + 1], it is the token at that position of the block that the vector comes from; any of them.
        following: [L + 1], the same for the next block, which is decoded from the vector.
        current_by_chance: [L + 1], as `current`, of another block of the text.
        following_by_chance: [L + 1], as `following`.
        common: tokens that are nearest most often, and how often.
    """

    current: Sequence[float]
    following: Sequence[float]
    current_by_chance: Sequence[float]
    following_by_chance: Sequence[float]
    common: tuple[tuple[str, float], ...]

    @property
    def shares(self) -> list[float]:
        """Of the current block and then of the next one."""
        return [*self.current, *self.following]

    @property
    def shares_by_chance(self) -> list[float]:
        """As `shares`."""
        return [*self.current_by_chance, *self.following_by_chance]


@dataclass(frozen=True)
class Example:
    """A block, the one behind it, and the token nearest to each vector between them."""

    current: str
    following: str
    nearest: tuple[str, ...]


@dataclass(frozen=True)
class ContextEmbeddingsResult(EvaluationResult):
    """Nearest tokens of all vectors of context embeddings.

    Attributes:
        blocks: how many context embeddings were looked at.
        vectors: the prefix vectors, or those that summation or cross-attention read.
        examples: some blocks of the text.
    """

    name = "context_embeddings"

    blocks: int
    vectors: tuple[NearestTokens, ...]
    examples: tuple[Example, ...]

    def lines(self) -> list[str]:
        """See EvaluationResult."""
        lines = [
            f"how often the token nearest to a vector of {self.blocks:,} context embeddings is in a block, in per cent "
            "(in brackets: in another block)",
            "vector " + "".join(f"{name:>18}" for name in self._names()),
        ]
        for index, vector in enumerate(self.vectors, start=1):
            pairs = zip(vector.shares, vector.shares_by_chance, strict=True)
            lines.append(f"{index:6d} " + "".join(f"{f'{100 * a:.1f} ({100 * b:.1f})':>18}" for a, b in pairs))
        for index, vector in enumerate(self.vectors, start=1):
            common = ", ".join(f"{text!r} {100 * share:.1f}" for text, share in vector.common)
            lines.append(f"nearest to vector {index} most often (per cent): {common}")
        for example in self.examples:
            nearest = " ".join(map(repr, example.nearest))
            lines.append(f"{example.current!r:>30} -> {nearest:<24} -> {example.following!r}")
        return lines

    def scalars(self) -> dict[str, float]:
        """How often each vector is nearest to the last token of the current block, and to any token of each."""
        scalars = {}
        for index, vector in enumerate(self.vectors, start=1):
            scalars[f"vector_{index}/last_of_current"] = vector.current[-2]
            scalars[f"vector_{index}/any_of_current"] = vector.current[-1]
            scalars[f"vector_{index}/any_of_next"] = vector.following[-1]
        return scalars

    def to_json(self) -> dict[str, object]:
        """See EvaluationResult."""
        return asdict(self)

    def draw(self, folder: Path) -> list[Path]:
        """Bars for each vector, and lines where chance would be."""
        if not can_plot():
            return []
        path = folder / "context_embeddings.png"
        names = self._names()
        width = 0.8 / len(self.vectors)
        with figure(path, width=max(6.4, 0.9 * len(names))) as (_, [axis]):
            for index, vector in enumerate(self.vectors):
                left = np.arange(len(names)) - 0.4 + index * width
                axis.bar(left, 100 * np.array(vector.shares), width, align="edge", label=f"vector {index + 1}")
                chance = 100 * np.array(vector.shares_by_chance)
                label = "in another block" if index == 0 else None
                axis.hlines(chance, left, left + width, colors="black", linewidth=1, label=label)
            axis.set_xticks(range(len(names)), names, rotation=30, ha="right")
            axis.set(ylabel="nearest token is there (per cent)", title=f"{self.blocks:,} context embeddings")
            axis.legend()
        return [path]

    def _names(self) -> list[str]:
        positions = range(1, len(self.vectors[0].current))
        return [
            name
            for block in ("current", "next")
            for name in (*(f"{block} {position}" for position in positions), f"any of {block}")
        ]
