"""Scores texts with a model that is one stage."""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from evaluation.padding import Padding, TextLayout
from evaluation.scoring import Score, ScoredText
from evaluation.text_batches import PlacedText, padded_batch, place_texts
from parallel.errors import ConfigurationError
from parallel.inputs import prepare_inputs
from parallel.output_head import OutputHead
from parallel.stage import Stage
from parallel.structure import piece_names

DEFAULT_BATCH_TOKENS = 16384
# Positions whose logits exist at once: with 50,000 tokens these are 200 MB.
LOGIT_ROWS = 1024


class StageScorer:
    """A Scorer; under tensor parallelism all its ranks make the same calls together and get the same scores.

    Args:
        stage: The whole model, built without sequence parallelism.
        pad_id: What training filled padded slots with (the end-of-text id): a partly padded block embeds it.
        padding: How the first block is filled; without a meaning for vanilla models.
        batch_tokens: Tokens of a batch, pads included; a longer text is a batch of its own.

    Raises:
        ConfigurationError: The stage is of another layout.
    """

    def __init__(
        self, stage: Stage, pad_id: int, padding: Padding | None, batch_tokens: int = DEFAULT_BATCH_TOKENS
    ) -> None:
        if stage.names != piece_names(stage.model_config) or stage.config.sequence_parallel:
            raise ConfigurationError(
                "scoring needs the whole model in one pipeline stage and whole sequences; build it with "
                "parallel.pipeline=1 and parallel.sequence_parallel=false"
            )
        self.stage = stage
        self.layout = TextLayout.of(stage.model_config, padding)
        self._pad_id = pad_id
        self._batch_tokens = batch_tokens
        self._device = next(stage.parameters()).device

    @property
    def max_length(self) -> int:
        """See Scorer; left pads take slots too, so that no text is longer than the model's sequences."""
        return self.layout.max_tokens - 1

    @torch.no_grad()
    def score(
        self, requests: Sequence[ScoredText], on_progress: Callable[[int], object] = lambda finished: None
    ) -> list[Score]:
        """Scores texts, see Scorer."""
        scores = [Score(0.0, False, 0)] * len(requests)
        texts = place_texts(requests, self.layout)
        on_progress(len(requests) - len(texts))
        for batch in self._batches(texts):
            for text, score in zip(batch, self._score_batch(batch), strict=True):
                scores[text.place] = score
            on_progress(len(batch))
        return scores

    def _batches(self, texts: list[PlacedText]) -> Iterator[list[PlacedText]]:
        """Texts of about the same length."""
        batch: list[PlacedText] = []
        slots = 0
        for text in texts:
            if batch and slots * (len(batch) + 1) > self._batch_tokens:
                yield batch
                batch = []
            if not batch:
                slots = self.layout.padded_length(len(text.token_ids))
            batch.append(text)
        if batch:
            yield batch

    def _score_batch(self, texts: list[PlacedText]) -> list[Score]:
        slots = self.layout.padded_length(len(texts[0].token_ids))
        batch = padded_batch(texts, (len(texts), slots), self.layout, self._pad_id, self._device)
        inputs = prepare_inputs(self.stage.model_config, batch)
        hidden = self.stage.run(None, inputs, self.stage.names[:-1])
        targets = torch.tensor(list(chain.from_iterable(text.targets for text in texts)), device=self._device)
        log_probabilities, are_greedy = self._evaluate(hidden[self._places(texts)], targets)
        counts = [len(text.targets) for text in texts]
        return [
            Score(float(part.double().sum()), bool(greedy.all()), len(part))
            for part, greedy in zip(log_probabilities.split(counts), are_greedy.split(counts), strict=True)
        ]

    def _places(self, texts: list[PlacedText]) -> tuple[Tensor, Tensor]:
        """First and second index of the hidden states that predict the targets, text by text."""
        length = self.layout.block_length
        rows: list[int] = []
        columns: list[int] = []
        begin = self._head.predicting.start or 0
        for sequence, text in enumerate(texts):
            for index in range(text.first, len(text.token_ids)):
                block, position = divmod(self.layout.left_pads + index, length)
                if self.stage.model_config.is_block:
                    rows.append((block - 1) * len(texts) + sequence)
                    columns.append(begin + position)
                else:
                    rows.append(block - 1)
                    columns.append(sequence)
        return torch.tensor(rows, device=self._device), torch.tensor(columns, device=self._device)

    def _evaluate(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities fp32 [R] of targets [R] at hidden states [R, D], and whether they are the most likely."""
        log_probabilities, are_greedy = [], []
        for rows, wanted in zip(hidden.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True):
            logits = self._head.logits_of(rows).float()
            log_probabilities.append(logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(dim=1))
            are_greedy.append(logits.argmax(dim=1) == wanted)
        return torch.cat(log_probabilities).cpu(), torch.cat(are_greedy).cpu()

    @property
    def _head(self) -> OutputHead:
        head = self.stage.piece(self.stage.names[-1])
        assert isinstance(head, OutputHead)
        return head
