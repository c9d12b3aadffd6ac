"""The order of the model's pieces, by name. Imports nothing heavy, so that a dry run is quick."""

from parallel.config import ModelConfig


def piece_names(config: ModelConfig) -> list[str]:
    """Names of all pieces in order; parameter names are these plus the name within the piece.

    No name starts with `decoder`: Megatron-core looks for modules of that name.
    """
    if not config.is_block:
        layers = [f"vanilla.layers.{i}" for i in range(config.vanilla.num_layers)]
        return ["vanilla.input", *layers, "vanilla.output"]
    return [
        "embedder",
        *(f"block_decoder.layers.{i}" for i in range(config.blocks.num_layers)),
        "block_decoder.output",
        "token_decoder.input",
        *(f"token_decoder.layers.{i}" for i in range(config.tokens.num_layers)),
        "token_decoder.output",
    ]


def holds_own_blocks(piece: str) -> bool:
    """Whether block parallelism has each tensor-parallel rank run a piece, which it holds whole, on its own blocks."""
    return piece == "token_decoder.input" or piece.startswith("token_decoder.layers.")
