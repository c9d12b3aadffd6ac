"""Asks a model for needles: all prompts, lengths and depths."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data.tokenizer import Tokenizer
from evaluation.needle.haystack import Haystack, read_haystack
from evaluation.needle.prompts import PromptBuilder
from evaluation.needle.result import NeedleCell, NeedleResult
from evaluation.needle.scoring import is_found, leading_digits
from evaluation.needle.wording import PROMPT_KINDS
from inference.generator import Generator
from parallel.config import ModelConfig
from parallel.errors import ConfigurationError

USUAL_LENGTHS = (2048, 4096, 8192, 16384)
DEPTHS = tuple(range(0, 101, 10))
DEFAULT_SAMPLES = 10
# The paper's. A number and the space before it are eight bytes, so a tokenizer of single bytes needs no more than that.
NEW_TOKENS = 20


@dataclass(frozen=True)
class NeedleTest:
    """A test that is ready to be run.

    Attributes:
        builder: makes the prompts.
        haystack: the text.
        lengths: tokens of the contexts.
        depths: of the needle, in per cent.
        samples: for each prompt, length and depth.
    """

    builder: PromptBuilder
    haystack: Haystack
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    samples: int

    def run(self, generator: Generator, batch_tokens: int) -> NeedleResult:
        """Generates all answers, greedily.

        Args:
            generator: the model.
            batch_tokens: prompts of so many tokens are read at once, but at least one.
        """
        rows = list(itertools.product(PROMPT_KINDS, self.lengths))
        cells: list[NeedleCell] = []
        total = len(rows) * len(self.depths) * self.samples
        with tqdm(total=total, unit="sample", desc="needle", disable=None) as bar:
            for kind, length in rows:
                places = list(itertools.product(self.depths, range(self.samples)))
                numbers, answers = [], []
                size = max(1, batch_tokens // length)
                for start in range(0, len(places), size):
                    batch = places[start : start + size]
                    made = [self.builder.sample(self.haystack, kind, length, depth, index) for depth, index in batch]
                    numbers += [sample.number for sample in made]
                    answers += self._answers(generator, [sample.prompt for sample in made])
                    bar.update(len(made))
                cells += self._cells(kind, length, numbers, answers)
        return NeedleResult(
            tuple(cells),
            self.builder.new_tokens,
            self.builder.seed,
            len(self.haystack.token_ids),
            self.haystack.numbers,
        )

    def _answers(self, generator: Generator, prompts: list[list[int]]) -> list[str]:
        tokenizer = self.builder.tokenizer
        tokens = generator.generate(prompts, self.builder.new_tokens, eos_id=tokenizer.eos_id)
        return [tokenizer.decode(ids) for ids in tokens]

    def _cells(self, kind: str, length: int, numbers: list[str], answers: list[str]) -> list[NeedleCell]:
        """The cells of one prompt and length, from all their samples."""
        cells = []
        for place, depth in enumerate(self.depths):
            here = slice(place * self.samples, (place + 1) * self.samples)
            pairs = list(zip(answers[here], numbers[here], strict=True))
            cells.append(
                NeedleCell(
                    kind,
                    length,
                    depth,
                    self.samples,
                    hits=sum(is_found(answer, number) for answer, number in pairs),
                    leading_digits=sum(leading_digits(answer, number) for answer, number in pairs),
                    example=answers[here][0],
                )
            )
        return cells


def prepare_needle_test(
    model: ModelConfig,
    tokenizer: Tokenizer,
    haystack: Path,
    lengths: Sequence[int] | None = None,
    samples: int = DEFAULT_SAMPLES,
    seed: int = 0,
    depths: Sequence[float] = DEPTHS,
    new_tokens: int = NEW_TOKENS,
) -> NeedleTest:
    """Checks a test and reads its text; needs no weights.

    Args:
        model: Settings of the model.
        tokenizer: The model's.
        haystack: A file, a glob pattern or a folder.
        lengths: Tokens of the contexts; by default the usual ones up to the model's.
        samples: For each prompt, length and depth.
        seed: Of the samples.
        depths: Of the needle, in per cent.
        new_tokens: Tokens of an answer.

    Raises:
        ConfigurationError: A length is too short, or there are no samples.
        DataError: The haystack is missing, empty or damaged.
    """
    if samples < 1:
        raise ConfigurationError(f"--needle-samples {samples} leaves nothing to ask; use 1 or more")
    known = [length for length in USUAL_LENGTHS if length <= model.sequence_length] or [model.sequence_length]
    chosen = tuple(dict.fromkeys(lengths or known))
    builder = PromptBuilder(tokenizer, model.unit_length, new_tokens, seed)
    builder.check_lengths(chosen, tuple(PROMPT_KINDS), "--needle-lengths")
    text = read_haystack(haystack, "--haystack", tokenizer, max(chosen))
    return NeedleTest(builder, text, chosen, tuple(depths), samples)
