"""What each piece of the model costs: forward FLOPs, parameters; and the pipeline cut that balances them.

One multiply-add counts as two FLOPs; attention is counted in full, not halved for causality. Norms, softmax, rotary
positions and other element-wise work are not counted.
"""

from dataclasses import dataclass

from parallel.config import DecoderConfig, ModelConfig
from parallel.structure import piece_names


@dataclass(frozen=True)
class PieceCost:
    """Cost of one piece.

    Attributes:
        name: the piece.
        parameters: trainable values in the whole model.
        split_parameters: those of them that tensor parallelism divides.
        forward_flops: FLOPs of the forward pass of one sequence.
    """

    name: str
    parameters: int
    split_parameters: int
    forward_flops: float

    def parameters_per_rank(self, tensor: int) -> int:
        """Parameters that one tensor-parallel rank holds."""
        return self.parameters - self.split_parameters + self.split_parameters // tensor


def piece_costs(config: ModelConfig) -> list[PieceCost]:
    """Costs of all pieces in the order of piece_names."""
    return [_piece_cost(name, config) for name in piece_names(config)]


def forward_flops_per_token(config: ModelConfig) -> float:
    """Forward FLOPs per token of a training sequence; a training step costs three times as much."""
    return sum(cost.forward_flops for cost in piece_costs(config)) / config.sequence_length


def total_parameters(config: ModelConfig) -> int:
    """Exact number of parameters of the whole model."""
    return sum(cost.parameters for cost in piece_costs(config))


def _piece_cost(name: str, config: ModelConfig) -> PieceCost:
    if ".layers." in name:
        if name.startswith("token_decoder"):
            return _layer_cost(name, config.tokens, config.num_blocks, config.local_length)
        if config.is_block:
            return _layer_cost(name, config.blocks, 1, config.num_blocks)
        return _layer_cost(name, config.vanilla, 1, config.sequence_length)
    if name == "embedder":
        table = config.vocab_size * (config.blocks.hidden_size // config.block_length)
        return PieceCost(name, table, table, 0.0)
    if name == "vanilla.input":
        table = config.vocab_size * config.vanilla.hidden_size
        return PieceCost(name, table, table, 0.0)
    if name == "block_decoder.output":
        return PieceCost(name, 2 * config.blocks.hidden_size, 0, 0.0)
    if name == "token_decoder.input":
        return _prefix_input_cost(name, config)
    return _output_cost(name, config)


def _layer_cost(name: str, stack: DecoderConfig, num_sequences: int, length: int) -> PieceCost:
    width, inner = stack.hidden_size, stack.feed_forward_size
    matrices = 4 * width * width + 2 * width * inner
    split_biases = 3 * width + inner  # biases of the column-parallel layers
    replicated = 6 * width  # two norms (4), biases of the row-parallel layers (2)
    linear = 2.0 * matrices * length
    attention = 2.0 * 2.0 * length * length * width
    return PieceCost(
        name, matrices + split_biases + replicated, matrices + split_biases, num_sequences * (linear + attention)
    )


def _prefix_input_cost(name: str, config: ModelConfig) -> PieceCost:
    outputs = config.prefix_length * config.tokens.hidden_size
    expansion = config.blocks.hidden_size * outputs
    table = config.vocab_size * config.tokens.hidden_size if config.block_length > 1 else 0
    return PieceCost(name, expansion + outputs + table, table, 2.0 * expansion * config.num_blocks)


def _output_cost(name: str, config: ModelConfig) -> PieceCost:
    width = config.stacks[-1].hidden_size
    head = width * config.vocab_size
    return PieceCost(name, head + 2 * width, head, 2.0 * head * config.sequence_length)


def balanced_cuts(costs: list[float], stages: int) -> list[range]:
    """Cuts a list into contiguous non-empty slices so that the most expensive slice is as cheap as possible.

    Ties go to the earliest cut, from the last stage backwards, so that the result is unique.

    Args:
        costs: non-negative cost of each piece.
        stages: number of slices, at most len(costs).

    Returns:
        One range of piece indices per stage.
    """
    best: dict[tuple[int, int], tuple[float, int]] = {}
    prefix = [0.0]
    for cost in costs:
        prefix.append(prefix[-1] + cost)
    for stop in range(1, len(costs) + 1):
        best[(1, stop)] = (prefix[stop], 0)
    for stage in range(2, stages + 1):
        for stop in range(stage, len(costs) + 1):
            options = (
                (max(best[(stage - 1, start)][0], prefix[stop] - prefix[start]), start)
                for start in range(stage - 1, stop)
            )
            best[(stage, stop)] = min(options)
    ranges: list[range] = []
    stop = len(costs)
    for stage in range(stages, 0, -1):
        start = best[(stage, stop)][1]
        ranges.insert(0, range(start, stop))
        stop = start
    return ranges


def pipeline_split(config: ModelConfig, stages: int) -> list[list[PieceCost]]:
    """The pieces of each pipeline stage, cut so that the slowest stage does as little work as possible."""
    costs = piece_costs(config)
    return [[costs[i] for i in cut] for cut in balanced_cuts([cost.forward_flops for cost in costs], stages)]
