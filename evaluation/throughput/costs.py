"""What generation costs at least: FLOPs, and bytes of weights and of keys and values that must be read.

B sequences of T_0 prompt tokens and T new ones. Weights are read once for all B sequences of a step, keys and values by
each; a multiply-add is two FLOPs. Embedding rows, norms, logits and other activations are not counted. Formulas: paper
sections 2.3 and 2.4; the attention of a prompt is counted causal.
"""

from dataclasses import dataclass

from parallel.component_config import DecoderConfig
from parallel.config import ModelConfig
from parallel.costs import PieceCost, piece_costs


@dataclass(frozen=True)
class Cost:
    """Work of one component.

    Attributes:
        flops: of matrix products.
        moved_bytes: read from memory.
    """

    flops: float = 0.0
    moved_bytes: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.moved_bytes + other.moved_bytes)


@dataclass(frozen=True)
class Workload:
    """What is generated.

    Attributes:
        model: the model.
        batch_size: sequences at a time (B).
        prompt_tokens: of each (T_0).
        new_tokens: of each (T).
        value_bytes: bytes of a weight, and of a key's or value's element.
    """

    model: ModelConfig
    batch_size: int
    prompt_tokens: int
    new_tokens: int
    value_bytes: int

    @property
    def prompt_steps(self) -> int:
        """Positions of the global decoder that the prompt takes."""
        return -(-self.prompt_tokens // self.model.unit_length)

    @property
    def global_steps(self) -> int:
        """Positions that the global decoder goes through after the prompt."""
        return -(-self.new_tokens // self.model.unit_length) - 1

    @property
    def cache_bytes_per_sequence(self) -> int:
        """Memory of keys and values (section 2.4), the token decoder's for one block."""
        model, length = self.model, self.prompt_tokens + self.new_tokens
        if not model.is_block:
            return _cache_values(model.vanilla) * length * self.value_bytes
        blocks = self.prompt_steps + self.global_steps + 1
        values = _cache_values(model.blocks) * blocks + _cache_values(model.tokens) * model.local_length
        return values * self.value_bytes


def _cache_values(stack: DecoderConfig) -> int:
    """Values that one position keeps in all layers of a stack."""
    return 2 * stack.num_layers * stack.key_value_heads * stack.head_size


def prompt_costs(work: Workload) -> dict[str, Cost]:
    """Costs by component until the first new token is there."""
    steps, batch = work.prompt_steps, work.batch_size
    matrices = _matrices(work.model)
    head = _product(work, matrices["head"], batch)
    if not work.model.is_block:
        causal = _attention(work, work.model.vanilla, steps * (steps + 1) / 2, reads_cache=False)
        return {"layers": _product(work, matrices["layers"], batch * steps) + causal, "head": head}
    causal = _attention(work, work.model.blocks, steps * (steps + 1) / 2, reads_cache=False)
    return {
        "embedder": _product(work, matrices["embedder"], batch * steps),
        "block decoder": _product(work, matrices["block decoder"], batch * steps) + causal,
        "expansion": _product(work, matrices["expansion"], batch),
        "token decoder": _first_place(work),
        "head": head,
    }


def decoding_costs(work: Workload) -> list[tuple[str, Cost, int]]:
    """Costs of each kind of step for the other tokens: component, cost of one step on average, number of steps."""
    model, batch, matrices = work.model, work.batch_size, _matrices(work.model)
    first = work.prompt_steps + 1
    mean_length = first + (work.global_steps - 1) / 2
    head = ("head", _product(work, matrices["head"], batch), work.new_tokens - 1)
    if not model.is_block:
        layers = _product(work, matrices["layers"], batch) + _attention(work, model.vanilla, mean_length)
        return [("layers", layers, work.global_steps), head]
    blocks = _product(work, matrices["block decoder"], batch) + _attention(work, model.blocks, mean_length)
    leading, local = model.leading_positions, model.local_length
    later = _product(work, matrices["token decoder"], batch) + _attention(work, model.tokens, (leading + 1 + local) / 2)
    return [
        ("embedder", _product(work, matrices["embedder"], batch), work.global_steps),
        ("block decoder", blocks, work.global_steps),
        ("expansion", _product(work, matrices["expansion"], batch), work.global_steps),
        ("token decoder", _first_place(work), work.global_steps),
        ("token decoder", later, work.new_tokens - work.global_steps - 1),
        head,
    ]


def _first_place(work: Workload) -> Cost:
    """The token decoder's first step in a block, over all positions before the block's first token."""
    model, leading = work.model, work.model.leading_positions
    return _product(work, _matrices(model)["token decoder"], work.batch_size * leading) + _attention(
        work, model.tokens, leading * (leading + 1) / 2, reads_cache=False
    )


def _product(work: Workload, matrices: float, rows: int) -> Cost:
    """So many weights, read once and multiplied with so many rows."""
    return Cost(2.0 * matrices * rows, matrices * work.value_bytes)


def _attention(work: Workload, stack: DecoderConfig, pairs: float, reads_cache: bool = True) -> Cost:
    """All layers' attention over so many pairs of query and key per sequence."""
    flops = 4.0 * stack.num_layers * stack.attention_size * pairs * work.batch_size
    values = _cache_values(stack) * pairs * work.batch_size if reads_cache else 0.0
    return Cost(flops, values * work.value_bytes)


def _matrices(model: ModelConfig) -> dict[str, float]:
    """Weights by component that a step multiplies with (tables are looked up, not multiplied)."""
    found: dict[str, float] = {"embedder": 0.0}
    for piece in piece_costs(model):
        name = _component(piece.name)
        if name is not None:
            found[name] = found.get(name, 0.0) + _weights(piece, model)
    return found


def _component(piece: str) -> str | None:
    if ".layers." in piece:
        return {"block_decoder": "block decoder", "token_decoder": "token decoder"}.get(
            piece.partition(".")[0], "layers"
        )
    outputs = {"embedder": "embedder", "token_decoder.input": "expansion"}
    return "head" if piece in ("token_decoder.output", "vanilla.output") else outputs.get(piece)


def _weights(piece: PieceCost, model: ModelConfig) -> float:
    if piece.name in ("token_decoder.output", "vanilla.output"):
        return float(model.vocab_size * model.stacks[-1].hidden_size)
    if piece.name == "token_decoder.input":
        return float(model.blocks.hidden_size * model.num_context_vectors * model.tokens.hidden_size)
    if piece.name == "embedder":
        table = model.vocab_size * model.embedder.vector_width(model.blocks.hidden_size, model.block_length)
        return float(piece.parameters - table)
    return float(piece.parameters)
