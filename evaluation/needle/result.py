"""Results of needle in a haystack."""

import itertools
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from evaluation.needle.scoring import RANDOM_FOUND, RANDOM_LEADING_DIGITS
from evaluation.needle.wording import NUMBER_DIGITS
from evaluation.plots import HeatMap, can_plot, draw_heat_maps
from evaluation.result import EvaluationResult


@dataclass(frozen=True)
class NeedleCell:
    """All samples of one prompt, length and depth.

    Attributes:
        prompt: kind of the prompt.
        length: tokens of the context.
        depth: of the needle, in per cent.
        samples: how many.
        hits: answers in which the number appears.
        leading_digits: digits right from the first one on, summed over the samples.
        example: the first answer.
    """

    prompt: str
    length: int
    depth: float
    samples: int
    hits: int
    leading_digits: int
    example: str


@dataclass(frozen=True)
class NeedleResult(EvaluationResult):
    """Hits by prompt, length and depth.

    Attributes:
        cells: every combination.
        new_tokens: tokens of an answer.
        seed: of the samples.
        haystack_tokens: size of the text.
        haystack_numbers: numbers in the text that look like a needle's.
    """

    name = "needle"

    cells: tuple[NeedleCell, ...]
    new_tokens: int
    seed: int
    haystack_tokens: int
    haystack_numbers: int

    def lines(self) -> list[str]:
        """See EvaluationResult."""
        depths = list(dict.fromkeys(cell.depth for cell in self.cells))
        lines = [
            f"answers with the number, in per cent, by depth of the needle; {self.cells[0].samples} samples each",
            "prompt   length " + "".join(f"{depth:>6g}" for depth in depths) + "  mean  digits right",
        ]
        for (prompt, length), row in self._rows():
            rates = "".join(f"{100 * cell.hits / cell.samples:6.1f}" for cell in row)
            lines.append(
                f"{prompt:<9}{length:6d} {rates}{100 * _rate(row):6.1f}  {_digits(row):.2f} of {NUMBER_DIGITS}"
            )
        lines.append(
            f"random numbers would give {100 * RANDOM_FOUND:.5f} per cent and {RANDOM_LEADING_DIGITS:.2f} digits; the "
            f"haystack of {self.haystack_tokens:,} tokens has {self.haystack_numbers} other numbers of "
            f"{NUMBER_DIGITS} digits that could be copied"
        )
        return lines

    def scalars(self) -> dict[str, float]:
        """Share of hits and mean number of leading digits by prompt and length."""
        scalars = {}
        for (prompt, length), row in self._rows():
            scalars[f"{prompt}/{length}/found"] = _rate(row)
            scalars[f"{prompt}/{length}/leading_digits"] = _digits(row)
        return scalars

    def to_json(self) -> dict[str, object]:
        """See EvaluationResult."""
        return {
            "new_tokens": self.new_tokens,
            "seed": self.seed,
            "haystack_tokens": self.haystack_tokens,
            "haystack_numbers": self.haystack_numbers,
            "random": {"found": RANDOM_FOUND, "leading_digits": RANDOM_LEADING_DIGITS},
            "found": {f"{prompt}/{length}": _rate(row) for (prompt, length), row in self._rows()},
            "cells": [asdict(cell) for cell in self.cells],
        }

    def draw(self, folder: Path) -> list[Path]:
        """A heat map for each prompt, lengths by depths."""
        if not can_plot():
            return []
        paths = []
        for prompt, cells in itertools.groupby(self.cells, key=lambda cell: cell.prompt):
            lengths = [list(row) for _, row in itertools.groupby(cells, key=lambda cell: cell.length)]
            rates = np.array([[100 * cell.hits / cell.samples for cell in row] for row in lengths]).T
            panel = HeatMap(
                f"needle found in per cent, {prompt} prompt",
                rates,
                rows=[f"{cell.depth:g}" for cell in lengths[0]],
                columns=[f"{row[0].length:,}" for row in lengths],
            )
            path = folder / f"needle_{prompt}.png"
            paths.append(draw_heat_maps(path, [panel], "depth (per cent)", "context (tokens)", limits=(0.0, 100.0)))
        return paths

    def _rows(self) -> Iterable[tuple[tuple[str, int], list[NeedleCell]]]:
        """Cells of each prompt and length, in order of depth."""
        groups = itertools.groupby(self.cells, key=lambda cell: (cell.prompt, cell.length))
        return [(key, list(group)) for key, group in groups]


def _rate(cells: Iterable[NeedleCell]) -> float:
    cells = list(cells)
    return sum(cell.hits for cell in cells) / sum(cell.samples for cell in cells)


def _digits(cells: Iterable[NeedleCell]) -> float:
    cells = list(cells)
    return sum(cell.leading_digits for cell in cells) / sum(cell.samples for cell in cells)
