"""The cost model against what torch counts and what the real modules hold."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from parallel.component_config import DecoderConfig
from parallel.config import ModelConfig, ParallelConfig
from parallel.costs import balanced_cuts, forward_flops_per_token, piece_costs, pipeline_split, total_parameters
from parallel.inputs import MicroBatch, prepare_inputs
from parallel.stage import Stage, build_stage
from parallel.topology import initialize_topology
from tests.processes import run_processes
from train.selftest_models import MODELS, VARIANTS

VOCAB_SIZE = 50304
HEADS = {256: 8, 512: 8, 768: 12, 1024: 16, 2048: 16}


def stack(layers: int, width: int, heads: int = 4, inner: int | None = None) -> DecoderConfig:
    return DecoderConfig(num_layers=layers, hidden_size=width, num_attention_heads=heads, ffn_hidden_size=inner)


def block(length: int, prefix: int, blocks: DecoderConfig, tokens: DecoderConfig, **sizes: Any) -> ModelConfig:
    shape = {"vocab_size": 96, "sequence_length": 48} | sizes
    return ModelConfig(block_length=length, prefix_length=prefix, block_decoder=blocks, token_decoder=tokens, **shape)


CONFIGS = {
    "main": block(4, 2, stack(2, 32), stack(2, 32)),
    "unequal widths": block(4, 2, stack(3, 64), stack(1, 48, 2)),
    "wide token decoder": block(2, 3, stack(1, 16, 2), stack(2, 48, 6)),
    "one token per block": block(1, 1, stack(2, 32), stack(2, 16, 2)),
    "long blocks": block(8, 1, stack(1, 32), stack(3, 32), vocab_size=320),
    "own inner width": block(4, 2, stack(2, 32, inner=72), stack(2, 32, inner=40)),
    "long sequence": block(4, 2, stack(2, 16, 2), stack(1, 16, 2), sequence_length=512),
    "vanilla": ModelConfig(architecture="vanilla", vocab_size=96, sequence_length=64, decoder=stack(3, 32)),
    **{name: MODELS[name] for name in VARIANTS},
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def product_flops(left: list[int], right: list[int], *_: object, out_shape: list[int]) -> int:
    """FLOPs of oneDNN's product, which torch does not count: left [..., k], right [m, k]."""
    return 2 * math.prod(left) * right[0]


ONEDNN_FLOPS = {torch.ops.mkldnn._linear_pointwise: product_flops}


def counted_flops(stage: Stage, batch: MicroBatch) -> dict[str, float]:
    """FLOPs of each piece's forward pass, as torch counts matrix products."""
    inputs = prepare_inputs(stage.model_config, batch)
    counted: dict[str, float] = {}
    hidden = None
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # torch does not count the fused CPU kernel
        for name in stage.names:
            with FlopCounterMode(display=False, custom_mapping=ONEDNN_FLOPS) as counter:
                hidden = stage.run(hidden, inputs, [name])
            counted[name] = counter.get_total_flops()
    # The head leaves out the last block (token), which has no targets; the cost is that of a whole sequence.
    counted[stage.names[-1]] *= inputs.target_mask.numel() / inputs.target_mask.sum().item()
    return counted


def parameters_of(stage: Stage, piece: str) -> list[torch.nn.Parameter]:
    """A piece's parameters; a shared table belongs to the piece that comes first."""
    return [parameter for name, parameter in stage.named_parameters() if name.startswith(f"{piece}.")]


@pytest.mark.usefixtures("library")
@configs
def test_flops_are_what_torch_counts(config: ModelConfig) -> None:
    stage = build_stage(config, ParallelConfig())
    num_sequences = 2
    ids = torch.zeros(num_sequences, config.sequence_length, dtype=torch.int64)
    counted = counted_flops(stage, MicroBatch(ids, torch.ones_like(ids, dtype=torch.bool)))
    for cost in piece_costs(config):
        assert num_sequences * cost.forward_flops == pytest.approx(counted[cost.name], rel=0.01), cost.name
    total = num_sequences * config.sequence_length * forward_flops_per_token(config)
    assert total == pytest.approx(sum(counted.values()), rel=0.01)


@configs
def test_parameters_are_what_each_piece_holds(config: ModelConfig) -> None:
    stage = build_stage(config, ParallelConfig(), seed=None)
    for cost in piece_costs(config):
        parameters = parameters_of(stage, cost.name)
        split = [one for one in parameters if getattr(one, "tensor_model_parallel", False)]
        assert cost.parameters == sum(one.numel() for one in parameters), cost.name
        assert cost.split_parameters == sum(one.numel() for one in split), cost.name
    assert total_parameters(config) == sum(one.numel() for one in stage.parameters())


@configs
def test_parameters_per_pipeline_stage(config: ModelConfig) -> None:
    layers = sum(one.num_layers for one in config.stacks)
    if config.tie_word_embeddings:
        layers = config.blocks.num_layers if config.is_block else 1
    for stages in range(1, layers + 1):
        built = [
            build_stage(config, ParallelConfig(pipeline=stages), seed=None, pipeline_rank=rank)
            for rank in range(stages)
        ]
        held = [sum(one.numel() for one in stage.parameters()) for stage in built]
        expected = [sum(cost.parameters for cost in part) for part in pipeline_split(config, stages)]
        assert held == expected
        assert sum(held) == total_parameters(config)


def _parameters_of_this_rank(cases: list[ModelConfig]) -> list[dict[str, int]]:
    parallel = ParallelConfig(tensor=2)
    initialize_topology(parallel)
    held = []
    for config in cases:
        stage = build_stage(config, parallel, seed=None)
        held.append({name: sum(one.numel() for one in parameters_of(stage, name)) for name in stage.names})
    return held


def test_parameters_per_tensor_parallel_rank() -> None:
    cases = list(CONFIGS.values())
    for held in run_processes(2, _parameters_of_this_rank, cases):
        for config, pieces in zip(cases, held, strict=True):
            assert pieces == {cost.name: cost.parameters_per_rank(2) for cost in piece_costs(config)}


def slowest(costs: list[float], cuts: list[range]) -> float:
    return max(sum(costs[i] for i in cut) for cut in cuts)


@given(st.data())
def test_balanced_cuts_equal_exhaustive_search(data: st.DataObject) -> None:
    # Whole numbers add up exactly, so that equal cuts cost exactly the same.
    costs = [float(cost) for cost in data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=9))]
    stages = data.draw(st.integers(1, len(costs)))
    cuts = balanced_cuts(costs, stages)
    assert [index for cut in cuts for index in cut] == list(range(len(costs)))
    assert len(cuts) == stages
    assert all(cuts)
    best = min(
        slowest(costs, [range(a, b) for a, b in itertools.pairwise((0, *inner, len(costs)))])
        for inner in itertools.combinations(range(1, len(costs)), stages - 1)
    )
    assert slowest(costs, cuts) == best


# The paper's models (layers of each decoder, width) with their published totals in millions.
PAPER_BLOCK = {
    "B5M": (3, 256, 33.85),
    "B19M": (3, 512, 77.39),
    "B85M": (6, 768, 173.16),
    "B302M": (12, 1024, 420.31),
    "B805M": (8, 2048, 1045.93),
    "B1.2B": (12, 2048, 1448.80),
}
PAPER_VANILLA = {"V5M": (6, 256, 30.5), "V19M": (6, 512, 70.43), "V85M": (12, 768, 162.32), "V302M": (24, 1024, 405.33)}


@pytest.mark.parametrize(("layers", "width", "millions"), PAPER_BLOCK.values(), ids=PAPER_BLOCK.keys())
def test_block_models_have_the_papers_size(layers: int, width: int, millions: float) -> None:
    decoder = stack(layers, width, HEADS[width])
    config = block(4, 2, decoder, decoder, vocab_size=VOCAB_SIZE, sequence_length=2048)
    assert round(total_parameters(config) / 1e6, 2) == millions


@pytest.mark.parametrize(("layers", "width", "millions"), PAPER_VANILLA.values(), ids=PAPER_VANILLA.keys())
def test_vanilla_models_have_the_papers_size(layers: int, width: int, millions: float) -> None:
    config = ModelConfig(architecture="vanilla", vocab_size=VOCAB_SIZE, decoder=stack(layers, width, HEADS[width]))
    digits = len(str(millions).partition(".")[2])
    assert round(total_parameters(config) / 1e6, digits) == millions
