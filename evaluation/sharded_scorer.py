"""Scores texts with a model that is spread over processes."""

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed
from torch import Tensor

from evaluation.padding import Padding, TextLayout
from evaluation.scoring import Score, ScoredText
from evaluation.text_batches import PlacedText, padded_batch, place_texts
from parallel.config import ModelConfig, ParallelConfig
from parallel.cpu_adaptation import compute_device
from parallel.errors import ConfigurationError
from parallel.inputs import MicroBatch, as_targets
from parallel.topology import Coordinates

Run = Callable[[Sequence[MicroBatch]], list[Tensor]]
# Micro-batches of a call for each pipeline stage: with four, it idles less than a fifth of the time.
ROUNDS_PER_STAGE = 4
# Lengths are rounded up by at most an eighth, so that there are few shapes of batches.
LENGTHS_PER_OCTAVE = 8


@dataclass(frozen=True)
class _Call:
    """Texts of about the same length, for `rounds` micro-batches [rows, slots] of each data-parallel rank.

    One text after the other goes to another rank; where there are too few, rows stay without a text.
    """

    texts: Sequence[PlacedText]
    rounds: int
    rows: int
    slots: int

    def of_rank(self, data_rank: int, data_size: int) -> list[Sequence[PlacedText]]:
        """The texts of each micro-batch of a rank."""
        mine = self.texts[data_rank::data_size]
        return [mine[start : start + self.rows] for start in range(0, self.rounds * self.rows, self.rows)]


class ShardedScorer:
    """A Scorer under any layout: all ranks make the same calls together and get the same scores.

    Args:
        run: runs this data-parallel rank's micro-batches of one shape, on all ranks together; see
            parallel.schedule.run_forward.
        model: the model's settings.
        parallel: the layout.
        place: this process's place in it.
        pad_id: what training filled padded slots with (the end-of-text id).
        padding: how the first block is filled; without a meaning for vanilla models.
        batch_tokens: tokens of a micro-batch, pads included; a longer text is one of its own.
    """

    def __init__(
        self,
        run: Run,
        model: ModelConfig,
        parallel: ParallelConfig,
        place: Coordinates,
        pad_id: int,
        padding: Padding | None,
        batch_tokens: int,
    ) -> None:
        self.layout = TextLayout.of(model, padding)
        self._run = run
        self._model = model
        self._parallel = parallel
        self._place = place
        self._pad_id = pad_id
        self._batch_tokens = batch_tokens
        self._device = compute_device()

    @property
    def max_length(self) -> int:
        """See Scorer."""
        return self.layout.max_tokens - 1

    def score(
        self, requests: Sequence[ScoredText], on_progress: Callable[[int], object] = lambda finished: None
    ) -> list[Score]:
        """Scores texts, see Scorer.

        Raises:
            ConfigurationError: not all ranks have the same texts.
        """
        texts = place_texts(requests, self.layout)
        self._check_alike(texts)
        on_progress(len(requests) - len(texts))
        # Of each request: log-probability, and scored tokens that are not the most likely ones.
        sums = torch.zeros(len(requests), 2, dtype=torch.float64, device=self._device)
        for call in self._calls(texts):
            of_batches = call.of_rank(self._place.data_rank, self._parallel.data)
            outputs = self._run([self._micro_batch(batch, call) for batch in of_batches])
            if self._place.tensor_rank == 0 and outputs:
                for batch, output in zip(of_batches, outputs, strict=True):
                    self._add(sums, batch, call, output)
            on_progress(len(call.texts))
        torch.distributed.all_reduce(sums)
        scored_tokens = {text.place: len(text.targets) for text in texts}
        return [
            Score(log_probability, place in scored_tokens and wrong == 0, scored_tokens.get(place, 0))
            for place, (log_probability, wrong) in enumerate(sums.tolist())
        ]

    def _calls(self, texts: Sequence[PlacedText]) -> Iterator[_Call]:
        """What is run together; a function of the texts and the layout, so the same on all ranks."""
        data_size = self._parallel.data
        rounds = ROUNDS_PER_STAGE * self._parallel.pipeline if self._parallel.pipeline > 1 else 1
        while texts:
            slots = self._slots(texts[0])
            rows = max(1, self._batch_tokens // slots)
            taken, texts = texts[: rows * data_size * rounds], texts[rows * data_size * rounds :]
            rows = -(-len(taken) // (data_size * rounds))
            yield _Call(taken, -(-len(taken) // (data_size * rows)), rows, slots)

    def _slots(self, text: PlacedText) -> int:
        """Length of the batch for a text: whole blocks, as many as divide where ranks have some each, and not any."""
        divisor = self._parallel.tensor if self._parallel.splits_rows else 1
        units, longest = (
            -(-self.layout.padded_length(tokens) // (self.layout.block_length * divisor))
            for tokens in (len(text.token_ids), self.layout.max_tokens)
        )
        step = max(1, 2 ** (units - 1).bit_length() // 2 // LENGTHS_PER_OCTAVE)
        return min(-(-units // step) * step, longest) * divisor * self.layout.block_length

    def _micro_batch(self, texts: Sequence[PlacedText], call: _Call) -> MicroBatch:
        batch = padded_batch(texts, (call.rows, call.slots), self.layout, self._pad_id, self._device)
        return replace(batch, scores_greedy=True)

    def _add(self, sums: Tensor, texts: Sequence[PlacedText], call: _Call, output: Tensor) -> None:
        """Adds what the last piece says of a micro-batch to the sums [requests, 2], in place."""
        counted = torch.zeros(call.rows, call.slots, dtype=torch.bool)
        for row, text in enumerate(texts):
            begin = self.layout.left_pads
            counted[row, begin + text.first : begin + len(text.token_ids)] = True
        counted = as_targets(self._model, counted.to(self._device))
        loss, is_greedy = output
        values = torch.stack((-loss, 1.0 - is_greedy), dim=-1).double()
        values = torch.where(counted[..., None], values, 0.0)
        of_rows = values.view(-1, call.rows, self._model.unit_length, 2).sum(dim=(0, 2))
        places = torch.tensor([text.place for text in texts], dtype=torch.int64, device=self._device)
        sums[places] += of_rows[: len(texts)]

    def _check_alike(self, texts: Sequence[PlacedText]) -> None:
        """Ranks with different texts would wait for each other without end."""
        checksum = 0
        for text in texts:
            header = np.array([text.place, text.first, len(text.token_ids)])
            checksum = zlib.crc32(np.asarray(text.token_ids).tobytes(), zlib.crc32(header.tobytes(), checksum))
        both = torch.tensor([checksum, -checksum], device=self._device)
        torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MAX)
        if both.sum() != 0:
            raise ConfigurationError(
                "the processes have different texts to score: the tasks' files, the tokenizer or the version of "
                "lm-eval differ between nodes; make them the same"
            )
