"""Generates text from text."""

from data.tokenizer import Tokenizer
from inference.errors import InferenceError
from inference.generator import Generator
from inference.sampling import SamplingConfig


def continue_text(
    generator: Generator, tokenizer: Tokenizer, prompt: str, max_new_tokens: int, sampling: SamplingConfig
) -> str:
    """Continues a text up to the model's end of text.

    Args:
        generator: The model.
        tokenizer: The one it was trained with.
        prompt: Text to continue.
        max_new_tokens: Most tokens to add.
        sampling: How tokens are chosen.

    Returns:
        The prompt and its continuation.

    Raises:
        InferenceError: The prompt gives no token, or max_new_tokens is negative.
    """
    prompt_ids = tokenizer.encode(prompt)
    if not prompt_ids:
        raise InferenceError(f"prompt {prompt!r} gives no token, and the model needs something to continue; add text")
    new_ids = generator.generate([prompt_ids], max_new_tokens, sampling, tokenizer.eos_id)[0]
    # Decoded together, because a tokenizer may drop the space before the first token of a text.
    known = tokenizer.decode(prompt_ids)
    return prompt + tokenizer.decode([*prompt_ids, *new_ids])[len(known) :]
