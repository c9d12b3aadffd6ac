"""The plainest way to score a text: alone, by one teacher-forced pass, softmax over all logits."""

from collections.abc import Sequence

import torch

from parallel.inputs import MicroBatch
from parallel.stage import Stage


@torch.no_grad()
def token_log_probabilities(
    stage: Stage, text: Sequence[int], pad_id: int, padding: str
) -> dict[int, tuple[float, bool]]:
    """Log-probability of each token of a text that is predicted, by its index, and whether it is the most likely."""
    length = stage.model_config.unit_length
    left = length - 1 if padding == "left" else 0
    right = -(left + len(text)) % length
    if left + len(text) <= length:
        return {}
    ids = torch.tensor([[pad_id] * left + list(text) + [pad_id] * right])
    mask = torch.tensor([[False] * left + [True] * len(text) + [False] * right])
    logits = stage.logits(MicroBatch(ids, mask)).reshape(ids.shape[1], -1)
    probabilities = torch.softmax(logits.double(), dim=-1)
    answers = {}
    for index, token in enumerate(text):
        row = left + index - length  # what predicts a token stands one block (token) before it
        if row >= 0:
            answers[index] = (float(probabilities[row, token].log()), int(probabilities[row].argmax()) == token)
    return answers


def slow_score(
    stage: Stage, context: Sequence[int], continuation: Sequence[int], pad_id: int, padding: str
) -> tuple[float, bool, int]:
    """Log-probability of a continuation, whether it is greedy, and how many of its tokens count."""
    model = stage.model_config
    room = model.sequence_length - (model.unit_length - 1 if padding == "left" else 0)
    text = [*context, *continuation][-room if model.is_block else -room - 1 :]
    predicted = token_log_probabilities(stage, text, pad_id, padding)
    begin = len(text) - len(continuation)
    counted = [answer for index, answer in predicted.items() if index >= begin]
    return sum(value for value, _ in counted), bool(counted) and all(best for _, best in counted), len(counted)
