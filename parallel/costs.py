"""What each piece of the model costs: forward FLOPs, parameters; and the pipeline cut that balances them.

One multiply-add counts as two FLOPs; attention is counted in full, not halved for causality. Norms, softmax, rotary
positions and other element-wise work are not counted.
"""

from dataclasses import dataclass

from parallel.component_config import BackboneConfig, DecoderConfig
from parallel.config import ModelConfig, ParallelConfig
from parallel.structure import holds_own_blocks, piece_names


@dataclass(frozen=True)
class PieceCost:
    """Cost of one piece.

    Attributes:
        name: the piece.
        parameters: trainable values in the whole model.
        split_parameters: those of them that tensor parallelism divides.
        forward_flops: FLOPs of the forward pass of one sequence.
        by_key_head: those of split_parameters that are divided by key and value heads.
        key_value_heads: how many there are.
    """

    name: str
    parameters: int
    split_parameters: int
    forward_flops: float
    by_key_head: int = 0
    key_value_heads: int = 1

    def shared_by(self, tensor: int) -> int:
        """Parameters that all ranks hold because there are fewer key heads than ranks (linear.SharedRowsLinear)."""
        return self.by_key_head if tensor > self.key_value_heads else 0

    def parameters_per_rank(self, tensor: int) -> int:
        """Parameters that one tensor-parallel rank holds."""
        divided = self.split_parameters - self.shared_by(tensor)
        return self.parameters - divided + divided // tensor

    def parameters_held(self, parallel: ParallelConfig) -> int:
        """Parameters that a process of a layout holds before ZeRO shards them."""
        if parallel.block_parallel and holds_own_blocks(self.name):
            return self.parameters
        return self.parameters_per_rank(parallel.tensor)


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
        return PieceCost(name, *_decoder_layer_cost(name, config), *_key_heads(name, config))
    costs = {
        "embedder": _embedder_cost,
        "vanilla.input": _vanilla_input_cost,
        "block_decoder.output": _block_output_cost,
        "token_decoder.input": _token_input_cost,
        "token_decoder.output": _output_cost,
        "vanilla.output": _output_cost,
    }
    return PieceCost(name, *costs[name](config))


_Cost = tuple[int, int, float]  # parameters, those of them that tensor parallelism divides, FLOPs of one sequence


def _decoder_layer_cost(name: str, config: ModelConfig) -> _Cost:
    if not name.startswith("token_decoder"):
        stack, length = (
            (config.blocks, config.num_blocks) if config.is_block else (config.vanilla, config.sequence_length)
        )
        return _layer_cost(stack, config.backbone, 1, length)
    stack = config.tokens
    cost = _layer_cost(stack, config.backbone, config.num_blocks, config.local_length)
    if not config.has_cross_attention:
        return cost
    return _sum(cost, _cross_attention_cost(config))


def _key_heads(name: str, config: ModelConfig) -> tuple[int, int]:
    """Parameters of a layer's matrices that hold keys and values; key and value heads."""
    backbone, crosses = config.backbone, config.has_cross_attention and name.startswith("token_decoder")
    stack = config.stacks[-1 if name.startswith("token_decoder") else 0]
    rows = stack.query_key_value_size + crosses * 2 * stack.key_value_heads * stack.head_size
    return rows * (stack.hidden_size + (backbone.bias != "none")), stack.key_value_heads


def _sum(*costs: _Cost) -> _Cost:
    parameters, split, flops = zip(*costs, strict=True)
    return sum(parameters), sum(split), sum(flops)


def _norm_size(width: int, backbone: BackboneConfig) -> int:
    return width * (2 if backbone.norm == "layer_norm" else 1)


def _layer_cost(stack: DecoderConfig, backbone: BackboneConfig, num_sequences: int, length: int) -> _Cost:
    width, inner, fused = stack.hidden_size, stack.feed_forward_size, stack.query_key_value_size
    expansions = 2 if backbone.feed_forward == "swiglu" else 1
    matrices = width * fused + stack.attention_size * width + (expansions + 1) * width * inner
    split_biases = (fused if backbone.bias != "none" else 0) + (expansions * inner if backbone.bias == "all" else 0)
    replicated = 2 * _norm_size(width, backbone) + (2 * width if backbone.bias == "all" else 0)
    replicated += 2 * stack.head_size if backbone.query_key_norm else 0
    attention = 2.0 * 2.0 * length * length * stack.attention_size
    flops = num_sequences * (2.0 * matrices * length + attention)
    return matrices + split_biases + replicated, matrices + split_biases, flops


def _cross_attention_cost(config: ModelConfig) -> _Cost:
    stack, backbone = config.tokens, config.backbone
    width, queries = stack.hidden_size, stack.attention_size
    keys_values = 2 * stack.key_value_heads * stack.head_size
    biases = queries + keys_values if backbone.bias != "none" else 0
    split = 2 * width * queries + width * keys_values + biases
    replicated = _norm_size(width, backbone) + (width if backbone.bias == "all" else 0)
    length, context = config.local_length, config.num_context_vectors
    linear = 2.0 * (2 * width * queries * length + width * keys_values * context)
    attention = 2.0 * 2.0 * length * context * queries
    return split + replicated, split, config.num_blocks * (linear + attention)


def _vanilla_input_cost(config: ModelConfig) -> _Cost:
    table = config.vocab_size * config.vanilla.hidden_size
    return table, table, 0.0


def _embedder_cost(config: ModelConfig) -> _Cost:
    embedder, width = config.embedder, config.blocks.hidden_size
    vector = embedder.vector_width(width, config.block_length)
    table = config.vocab_size * vector
    cost: _Cost = (table, table, 0.0)
    if embedder.has_projection:
        inputs = embedder.num_vectors(config.block_length) * vector
        cost = _sum(cost, (inputs * width + width, 0, 2.0 * inputs * width * config.num_blocks))
    return _sum(cost, _encoder_cost(config)) if embedder.has_encoder else cost


def _encoder_cost(config: ModelConfig) -> _Cost:
    """Everything of a RoBERTa encoder but its word embeddings."""
    encoder, embedder = config.embedder.roberta, config.embedder
    length = config.block_length + (embedder.num_cls_tokens if embedder.kind == "roberta_cls" else 0)
    tables: _Cost = ((encoder.max_positions + 1 + 2) * encoder.hidden_size, 0, 0.0)  # positions, token type, norm
    layer = _layer_cost(encoder.stack, BackboneConfig(), config.num_blocks, length)
    return _sum(tables, *[layer] * encoder.num_layers)


def _block_output_cost(config: ModelConfig) -> _Cost:
    return _norm_size(config.blocks.hidden_size, config.backbone), 0, 0.0


def _token_input_cost(config: ModelConfig) -> _Cost:
    outputs = config.num_context_vectors * config.tokens.hidden_size
    expansion = config.blocks.hidden_size * outputs
    table = config.vocab_size * config.tokens.hidden_size if config.embeds_local_tokens else 0
    return expansion + outputs + table, table, 2.0 * expansion * config.num_blocks


def _output_cost(config: ModelConfig) -> _Cost:
    width = config.stacks[-1].hidden_size
    head = width * config.vocab_size
    own = 0 if config.tie_word_embeddings else head
    return own + _norm_size(width, config.backbone), own, 2.0 * head * config.sequence_length


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
    """The pieces of each pipeline stage, cut so that the slowest stage does as little work as possible.

    Pieces that share a table, and those between them, stay together.
    """
    groups = _inseparable(piece_costs(config), config.tied_pieces)
    totals = [sum(cost.forward_flops for cost in group) for group in groups]
    return [[cost for i in cut for cost in groups[i]] for cut in balanced_cuts(totals, stages)]


def _inseparable(costs: list[PieceCost], tied: tuple[str, str] | None) -> list[list[PieceCost]]:
    if tied is None:
        return [[cost] for cost in costs]
    names = [cost.name for cost in costs]
    first, stop = names.index(tied[0]), names.index(tied[1]) + 1
    return [*([cost] for cost in costs[:first]), costs[first:stop], *([cost] for cost in costs[stop:])]
