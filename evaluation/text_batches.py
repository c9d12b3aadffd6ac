"""Texts that are scored, as rows of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from evaluation.padding import TextLayout
from evaluation.scoring import ScoredText
from parallel.inputs import MicroBatch


@dataclass(frozen=True)
class PlacedText:
    """A request: its place among them, its tokens as far as they fit, and the first token that is scored."""

    place: int
    token_ids: Sequence[int]
    first: int

    @property
    def targets(self) -> Sequence[int]:
        """The scored tokens."""
        return self.token_ids[self.first :]


def place_texts(requests: Sequence[ScoredText], layout: TextLayout) -> list[PlacedText]:
    """The requests that have anything to score, the longest first: memory runs out at once or not at all."""
    texts = [_placed(place, request, layout) for place, request in enumerate(requests)]
    return sorted((text for text in texts if text.targets), key=lambda text: -len(text.token_ids))


def _placed(place: int, request: ScoredText, layout: TextLayout) -> PlacedText:
    token_ids = [*request.context, *request.continuation][-layout.max_tokens :]
    first = max(len(token_ids) - len(request.continuation), layout.first_predicted)
    return PlacedText(place, token_ids, first)


def padded_batch(
    texts: Sequence[PlacedText], shape: tuple[int, int], layout: TextLayout, pad_id: int, device: torch.device
) -> MicroBatch:
    """Texts behind their left pads, padded on the right.

    Nothing before sees right pads: attention is causal, and no position of a padded block is scored. So they count as
    real: then no mask is needed, and the fast kernels run.

    Args:
        texts: at most as many as there are rows.
        shape: [B, S] of the batch; rows without a text hold nothing but pads.
        layout: where a text lies.
        pad_id: what training filled padded slots with (the end-of-text id): a partly padded block embeds it.
        device: where the batch goes.
    """
    token_ids = torch.full(shape, pad_id, dtype=torch.int64)
    begin = layout.left_pads
    for row, text in enumerate(texts):
        token_ids[row, begin : begin + len(text.token_ids)] = torch.tensor(text.token_ids)
    mask = torch.ones_like(token_ids, dtype=torch.bool)
    mask[:, :begin] = False
    return MicroBatch(token_ids.to(device), mask.to(device))
