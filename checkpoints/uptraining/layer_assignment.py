"""Which layers of a vanilla model each decoder of a Block Transformer starts from (paper section 3.7, appendix G.8)."""

import random
from typing import Literal, get_args

from checkpoints.errors import CheckpointError

Method = Literal["partition", "skip", "duplicate", "average", "random"]
METHODS: tuple[Method, ...] = get_args(Method)

Assignment = list[tuple[int, ...]]  # for each layer, the source layers whose mean it becomes


def assign_layers(
    method: Method, source_layers: int, block_layers: int, token_layers: int, seed: int = 0
) -> tuple[Assignment, Assignment]:
    """Assigns source layers to both decoders.

    Args:
        method: `partition`: the first layers become the block decoder, the others the token decoder; `skip`: every k-th
            layer, from the first on, to both; `duplicate`: all layers to both; `average`: means of k neighbouring
            layers to both; `random`: different layers in random order, a control.
        source_layers: layers of the vanilla model.
        block_layers: layers of the block decoder.
        token_layers: layers of the token decoder.
        seed: of the random order.

    Returns:
        Source layers of each block-decoder layer and of each token-decoder layer.

    Raises:
        CheckpointError: the numbers of layers do not fit the method.
    """
    both = block_layers + token_layers
    if method == "partition":
        _require(both == source_layers, method, f"{both} layers in both decoders together", source_layers)
        return [(i,) for i in range(block_layers)], [(i,) for i in range(block_layers, both)]
    if method == "random":
        _require(both <= source_layers, method, f"at least {both} layers", source_layers)
        drawn = random.Random(seed).sample(range(source_layers), both)
        return [(i,) for i in drawn[:block_layers]], [(i,) for i in drawn[block_layers:]]
    return _thinned(method, source_layers, block_layers), _thinned(method, source_layers, token_layers)


def _thinned(method: Method, source_layers: int, layers: int) -> Assignment:
    if method == "duplicate":
        _require(layers == source_layers, method, f"{layers} layers in each decoder", source_layers)
    _require(source_layers % layers == 0, method, f"a multiple of {layers} layers", source_layers)
    stride = source_layers // layers
    taken = stride if method == "average" else 1
    return [tuple(range(i * stride, i * stride + taken)) for i in range(layers)]


def _require(fits: bool, method: Method, wanted: str, source_layers: int) -> None:
    if not fits:
        raise CheckpointError(
            f"layer assignment {method} asks for {wanted}, the vanilla model has {source_layers}; change num_layers "
            f"of the target's decoders or use another method ({', '.join(METHODS)})"
        )
