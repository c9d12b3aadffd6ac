"""Measures several models at several settings and batch sizes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from evaluation.throughput.batch_search import search_batch_sizes
from evaluation.throughput.costs import Workload
from evaluation.throughput.measurement import Measurement, measure, split_walltime
from evaluation.throughput.records import Point, Record, RecordFile, digest_of
from inference.errors import InferenceError
from inference.generator import Generator
from inference.memory import free_memory
from parallel.config import ModelConfig
from parallel.device_limits import DeviceLimits
from parallel.stage import Stage


@dataclass(frozen=True)
class Setting:
    """Prompt tokens and new tokens of each sequence."""

    prompt_tokens: int
    new_tokens: int

    def __str__(self) -> str:
        return f"{self.prompt_tokens}/{self.new_tokens}"


@dataclass(frozen=True)
class Candidate:
    """A model to measure.

    Attributes:
        name: for the table.
        config: its settings.
        load: builds it with its weights.
        loss: its loss, if known, for the plot of throughput against loss.
    """

    name: str
    config: ModelConfig
    load: Callable[[], Stage]
    loss: float | None = None


class Study:
    """Measures one model after the other; only one is in memory.

    Args:
        limits: of the device.
        records: where measurements go, and where those of an earlier study are.
        repeats: timed runs of each point.
        tell: called with each line of progress.
    """

    def __init__(
        self, limits: DeviceLimits, records: RecordFile, repeats: int, tell: Callable[[str], object] = print
    ) -> None:
        self._limits = limits
        self._records = records
        self._repeats = repeats
        self._tell = tell

    def run(
        self, candidate: Candidate, settings: Sequence[Setting], batch_sizes: Sequence[int], largest: int | None = None
    ) -> dict[Setting, dict[str, float]]:
        """Measures one model.

        Args:
            candidate: the model.
            settings: prompt and new tokens.
            batch_sizes: to measure.
            largest: the largest batch size that fits is searched too, up to this; None: it is not.

        Returns:
            For each setting, seconds by component at the largest batch size.
        """
        generator = Generator(candidate.load(), pad_id=0)
        for setting in settings:
            for size in batch_sizes:
                self._measured(generator, candidate, setting, size)
            if largest is not None:
                attempt = partial(self._peak_bytes, generator, candidate, setting)
                search_batch_sizes(attempt, free_memory(_device(generator)), largest)
        one_by_one = Generator(generator.stage, pad_id=0, graphs=False)
        sizes = {setting: self._largest_measured(candidate, setting) for setting in settings}
        return {
            setting: split_walltime(one_by_one, self._work(generator, candidate, setting, size))
            for setting, size in sizes.items()
            if size is not None
        }

    def _peak_bytes(self, generator: Generator, candidate: Candidate, setting: Setting, size: int) -> int | None:
        measured = self._measured(generator, candidate, setting, size)
        return None if measured is None else measured.peak_bytes

    def _measured(self, generator: Generator, candidate: Candidate, setting: Setting, size: int) -> Measurement | None:
        """Measures a point, unless that has been done before."""
        point = self._point(candidate, setting, size)
        if point not in self._records.records:
            self._records.add(Record(point, self._attempt(generator, candidate, setting, size)))
        measured = self._records.records[point].measurement
        speed = "does not fit" if measured is None else f"{measured.tokens_per_second:,.1f} tokens/s"
        self._tell(f"{candidate.name}, {setting} tokens, batch {size}: {speed}")
        return measured

    def _attempt(self, generator: Generator, candidate: Candidate, setting: Setting, size: int) -> Measurement | None:
        try:
            return measure(generator, self._work(generator, candidate, setting, size), self._limits, self._repeats)
        except InferenceError as error:
            self._tell(str(error))
            return None
        finally:
            if _device(generator).type == "cuda":
                torch.cuda.empty_cache()

    def _work(self, generator: Generator, candidate: Candidate, setting: Setting, size: int) -> Workload:
        value_bytes = next(generator.stage.parameters()).element_size()
        return Workload(candidate.config, size, setting.prompt_tokens, setting.new_tokens, value_bytes)

    def _point(self, candidate: Candidate, setting: Setting, size: int) -> Point:
        limits = self._limits
        digest = digest_of(candidate.config)
        return Point(
            candidate.name, digest, limits.device, limits.dtype, setting.prompt_tokens, setting.new_tokens, size
        )

    def _largest_measured(self, candidate: Candidate, setting: Setting) -> int | None:
        sizes = [
            point.batch_size
            for point, record in self._records.records.items()
            if record.measurement is not None and self._point(candidate, setting, point.batch_size) == point
        ]
        return max(sizes, default=None)


def _device(generator: Generator) -> torch.device:
    return next(generator.stage.parameters()).device
