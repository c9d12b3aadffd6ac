"""Checks prompts and puts them into one batch."""

from collections.abc import Sequence

import torch

from inference.errors import InferenceError
from parallel.inputs import MicroBatch


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Checks that every prompt can be generated from.

    Raises:
        InferenceError: a prompt is empty or holds an id outside the vocabulary.
    """
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise InferenceError(
                f"prompt {index} is empty, and the model needs something to continue; give at least one token, such as "
                "the end-of-text token"
            )
        wrong = next((token for token in prompt if not 0 <= token < vocab_size), None)
        if wrong is not None:
            raise InferenceError(
                f"prompt {index} holds token id {wrong}, the model knows 0 to {vocab_size - 1}; "
                "use the tokenizer the model was trained with"
            )


def pad_prompts(prompts: Sequence[Sequence[int]], unit: int, pad_id: int, device: torch.device) -> MicroBatch:
    """Pads prompts on the left so that all end together, on a block boundary.

    Args:
        prompts: token ids, none empty.
        unit: the block length; 1 for vanilla.
        pad_id: what training filled padded slots with; a partly padded block embeds it.
        device: where the batch goes.
    """
    longest = max(len(prompt) for prompt in prompts)
    length = -(-longest // unit) * unit
    token_ids = torch.full((len(prompts), length), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(prompts), length), dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        token_ids[row, length - len(prompt) :] = torch.tensor(prompt, dtype=torch.int64)
        mask[row, length - len(prompt) :] = True
    return MicroBatch(token_ids.to(device), mask.to(device))
