"""Where a text that is scored lies in the blocks of a sequence.

A Block Transformer never predicts the first block of a sequence. Two conventions deal with that:
    left: L - 1 pads stand before the text, so that the first block holds its first token alone, and all others are
        predicted. This is one of the ways in which documents begin under `data.random_left_padding`.
    none: the text begins with the first block; its first L tokens are never predicted and do not count.
"""

from dataclasses import dataclass
from typing import Literal, Self

from data.config import DataConfig
from parallel.config import ModelConfig
from parallel.errors import ConfigurationError

Padding = Literal["left", "none"]
PADDINGS = ("auto", "left", "none")


def choose_padding(
    setting: str, model: ModelConfig, data: DataConfig | None, called: str = "--padding"
) -> Padding | None:
    """The convention of a model: `auto` means left, if it has been trained with left padding or that is unknown.

    Args:
        setting: One of PADDINGS.
        model: Its settings.
        data: What it was trained on, if known.
        called: What the user calls the setting.

    Returns:
        None for vanilla models.

    Raises:
        ConfigurationError: A convention is given for a vanilla model.
    """
    if not model.is_block:
        if setting != "auto":
            raise ConfigurationError(f"{called} {setting} is for block models, and this one is vanilla; leave it out")
        return None
    if setting == "auto":
        pads_left = data is None or any(data.pads_left(source) for source in data.corpora.values())
        return "left" if pads_left else "none"
    return "left" if setting == "left" else "none"


@dataclass(frozen=True)
class TextLayout:
    """The place of a text; vanilla models have blocks of one token.

    Attributes:
        block_length: Tokens of a block.
        left_pads: Pads before the text.
        first_predicted: The first token of the text that is predicted; tokens count from 0.
        max_tokens: Tokens of the longest text, the last one included, which is only predicted.
    """

    block_length: int
    left_pads: int
    first_predicted: int
    max_tokens: int

    @classmethod
    def of(cls, model: ModelConfig, padding: Padding | None) -> Self:
        """The layout of a model; `padding` has no meaning for vanilla ones."""
        if not model.is_block:
            # The last token is no input, so that it needs no place.
            return cls(1, 0, 1, model.sequence_length + 1)
        length = model.block_length
        if padding == "none":
            return cls(length, 0, length, model.sequence_length)
        return cls(length, length - 1, 1, model.sequence_length - (length - 1))

    def padded_length(self, tokens: int) -> int:
        """Slots of a text: whole blocks."""
        return -(-(self.left_pads + tokens) // self.block_length) * self.block_length
