"""The configurations in configs/ against the paper's figures, which stand here as literals.

Parameters are counted on the real model, on the meta device: no weight is allocated.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed

from parallel.config import ModelConfig, ParallelConfig
from parallel.costs import total_parameters
from parallel.stage import Stage
from parallel.topology import start_single_process
from train.config import RunConfig
from train.config_file import load_config
from train.model_table import non_embedding_parameters, run_files

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FILES = {path.stem: path for path in run_files(CONFIGS)}
VOCABULARY = 50304
ENDS_OF_STACKS = (".output.norm.weight", ".output.norm.bias")


class Run(NamedTuple):
    """One run of the paper; None is a value that the run does not have."""

    block_length: int | None
    embedder: str | None
    context: str | None
    prefix: int | None
    stacks: tuple[tuple[int, int, int], ...]  # layers, width, heads
    batch: int
    micro_batch: int
    learning_rate: float
    warmup: int
    steps: int
    stop: int | None
    save: int
    log: int
    padding: bool | None


def block(
    layers: int,
    width: int,
    heads: int,
    *rest: object,
    prefix: int | None = 2,
    embedder: str = "lookup",
    length: int = 4,
) -> Run:
    stack = (layers, width, heads)
    return Run(length, embedder, "prefix", prefix, (stack, stack), *rest)  # type: ignore[arg-type]


def megabyte(stacks: tuple[tuple[int, int, int], ...], *rest: object) -> Run:
    return Run(4, "lookup", "summation", None, stacks, *rest)  # type: ignore[arg-type]


def vanilla(layers: int, width: int, heads: int, *rest: object) -> Run:
    return Run(None, None, None, None, ((layers, width, heads),), *rest)  # type: ignore[arg-type]


M85 = (6, 768, 12)
# Columns: batch, micro-batch, learning rate, warm-up, steps, stop, save, log, padding. The uptraining runs have the
# steps of the full schedule, of which the tool takes a tenth.
RUNS = {
    "block_main_b4_5": block(3, 256, 8, 256, 32, 1e-3, 3000, 572000, None, 10000, 200, True),
    "block_main_b4_19": block(3, 512, 8, 256, 32, 1e-3, 3000, 572000, None, 10000, 200, True),
    "block_main_b4_85": block(6, 768, 12, 256, 8, 6e-4, 3000, 572000, None, 10000, 200, True),
    "block_main_b4_300": block(12, 1024, 16, 256, 8, 3e-4, 3000, 572000, None, 10000, 200, False),
    "block_main_b4_800": block(8, 2048, 16, 512, 16, 3e-4, 1500, 286000, None, 5000, 100, False),
    "block_main_b4_1.2b": block(12, 2048, 16, 512, 16, 2e-4, 1500, 286000, None, 5000, 100, False),
    "block_main_b4_85_flop_v70": block(6, 768, 12, 256, 16, 6e-4, 3000, 266317, None, 10000, 200, False),
    "block_main_b4_300_flop_v70": block(12, 1024, 16, 256, 8, 3e-4, 3000, 98120, None, 8000, 200, False),
    "block_main_b4_800_flop_v70": block(8, 2048, 16, 512, 16, 3e-4, 1500, 19300, None, 5000, 100, False),
    "block_main_b4_1.2b_flop_v70": block(12, 2048, 16, 512, 16, 2e-4, 1500, 13530, None, 4000, 100, False),
    "block_ablation_b4_85_lookup_prefix": block(*M85, 256, 16, 6e-4, 3000, 572000, 20000, 5000, 200, False, prefix=1),
    "block_ablation_b4_85_roberta_prefix": block(
        *M85, 256, 16, 6e-4, 3000, 572000, 20000, 5000, 200, False, prefix=1, embedder="roberta"
    ),
    "block_ablation_b4_85_cls_sum": Run(
        4, "roberta_cls", "summation", None, (M85, M85), 256, 16, 6e-4, 3000, 572000, 50000, 5000, 200, False
    ),
    "block_ablation_b4_85_cls_cross_attn": Run(
        4, "roberta_cls", "cross_attention", None, (M85, M85), 256, 32, 6e-4, 3000, 572000, 50000, 5000, 200, False
    ),
    "block_vanilla_ablation_b1_85": block(*M85, 256, 16, 6e-4, 3000, 572000, None, 5000, 200, True, prefix=1, length=1),
    "block_megabyte_b4_5": megabyte(((5, 256, 8), (4, 128, 4)), 256, 32, 1e-3, 3000, 572000, None, 10000, 200, False),
    "block_megabyte_b4_19": megabyte(((5, 512, 8), (4, 256, 8)), 256, 16, 1e-3, 3000, 572000, None, 10000, 200, False),
    "block_megabyte_b4_85": megabyte(
        ((11, 768, 12), (4, 512, 8)), 256, 32, 6e-4, 3000, 572000, None, 10000, 200, False
    ),
    "block_uptrain_b4_85_10": block(
        *M85, 256, 16, 6e-4, 3000, 572000, None, 5000, 200, True, embedder="lookup_projection"
    ),
    "block_uptrain_b4_300_10": block(
        12, 1024, 16, 256, 8, 3e-4, 3000, 572000, None, 5000, 200, True, embedder="lookup_projection"
    ),
    "block_uptrain_b4_800_10": block(
        8, 2048, 8, 512, 8, 3e-4, 1500, 286000, None, 1250, 100, True, embedder="lookup_projection"
    ),
    "vanilla_31": vanilla(6, 256, 8, 256, 32, 1e-3, 3000, 572000, None, 10000, 200, None),
    "vanilla_70": vanilla(6, 512, 8, 256, 8, 1e-3, 3000, 572000, None, 10000, 200, None),
    "vanilla_160": vanilla(12, 768, 12, 256, 8, 6e-4, 3000, 572000, None, 10000, 200, None),
    "vanilla_410": vanilla(24, 1024, 16, 256, 8, 3e-4, 3000, 572000, None, 10000, 200, None),
}
# Table 1 and 3 of the paper: parameters of the layers and their norms, and in all, in millions. The reference's unused
# table is not counted.
MAIN_PARAMETERS = {
    "vanilla_31": (4.74, 30.49),
    "vanilla_70": (18.92, 70.43),
    "vanilla_160": (85.06, 162.32),
    "vanilla_410": (302.31, 405.33),
    "block_main_b4_5": (4.74, 33.85),
    "block_main_b4_19": (18.92, 77.39),
    "block_main_b4_85": (85.06, 173.16),
    "block_main_b4_300": (302.31, 420.31),
    "block_main_b4_800": (805.74, 1045.93),
    "block_main_b4_1.2b": (1208.61, 1448.80),
}
MEGABYTE_PARAMETERS = {
    "block_megabyte_b4_5": (3.95, 0.79),
    "block_megabyte_b4_19": (15.76, 3.16),
    "block_megabyte_b4_85": (77.97, 12.61),
}


@pytest.fixture(scope="module", autouse=True)
def single_process() -> Iterator[None]:
    """A process group of one: Megatron-core's layers ask for their place in it."""
    start_single_process()
    yield
    torch.distributed.destroy_process_group()


@cache
def config_of(name: str) -> RunConfig:
    return load_config(FILES[name])


@cache
def parameters_of(model: ModelConfig) -> dict[str, int]:
    """Sizes of the real model's parameters by name."""
    with torch.device("meta"):
        stage = Stage(model, ParallelConfig())
    assert {parameter.device.type for parameter in stage.parameters()} == {"meta"}
    return {name: parameter.numel() for name, parameter in stage.named_parameters()}


def count(name: str, prefix: str = "") -> int:
    return sum(size for key, size in parameters_of(config_of(name).model).items() if key.startswith(prefix))


def count_layers(name: str, stack: str = "") -> int:
    """Parameters of the decoder layers and of the norms behind them."""
    sizes = parameters_of(config_of(name).model)
    return sum(
        size
        for key, size in sizes.items()
        if key.startswith((f"{stack}.",) if stack else ("block_decoder.", "token_decoder.", "vanilla."))
        and (".layers." in key or key.endswith(ENDS_OF_STACKS))
    )


def layers_by_formula(layers: int, width: int) -> int:
    """GPT-NeoX layers, 12 D^2 + 13 D each, and the norm behind them."""
    return layers * (12 * width**2 + 13 * width) + 2 * width


def described(config: RunConfig) -> Run:
    """What a configuration says, in the columns of the table above."""
    model, train, is_block = config.model, config.train, config.model.is_block
    padding = {config.data.random_left_padding, config.data.pad_to_block_boundary}
    assert len(padding) == 1
    return Run(
        block_length=model.block_length if is_block else None,
        embedder=model.embedder.kind if is_block else None,
        context=model.token_decoder_input if is_block else None,
        prefix=model.prefix_length if is_block and model.token_decoder_input == "prefix" else None,
        stacks=tuple((s.num_layers, s.hidden_size, s.num_attention_heads) for s in model.stacks),
        batch=train.global_batch_size,
        micro_batch=train.micro_batch_size,
        learning_rate=config.optimizer.learning_rate,
        warmup=config.optimizer.warmup_steps,
        steps=train.steps,
        stop=train.stop_step,
        save=config.checkpoint.every,
        log=config.logging.every,
        padding=padding.pop() if is_block else None,
    )


@pytest.mark.parametrize("name", RUNS)
def test_a_run_has_the_papers_settings(name: str) -> None:
    config = config_of(name)
    assert described(config) == RUNS[name]
    assert (config.model.vocab_size, config.model.sequence_length) == (VOCABULARY, 2048)
    assert all(stack.feed_forward_size == 4 * stack.hidden_size for stack in config.model.stacks)
    optimizer = config.optimizer
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay, optimizer.epsilon) == (0.9, 0.95, 0.1, 1e-8)
    assert (optimizer.minimum_ratio, optimizer.clip_gradient_norm, optimizer.decay) == (0.1, 1.0, "all")
    assert config.train.precision == "bf16"


@pytest.mark.parametrize("name", FILES)
def test_the_cost_model_counts_the_real_model(name: str) -> None:
    assert count(name) == total_parameters(config_of(name).model)
    assert count_layers(name) == non_embedding_parameters(config_of(name).model)


@pytest.mark.parametrize("name", MAIN_PARAMETERS)
def test_main_models_have_the_papers_parameters(name: str) -> None:
    stacks = [(layers, width) for layers, width, _ in RUNS[name].stacks]
    layers = sum(layers_by_formula(*stack) for stack in stacks)
    width = stacks[0][1]
    tables = 2 * VOCABULARY * width  # token table and head
    if len(stacks) == 2:
        tables += VOCABULARY * (width // 4) + 2 * width**2 + 2 * width  # embedder, expansion
    assert (count_layers(name), count(name)) == (layers, layers + tables)
    assert (round(count_layers(name) / 1e6, 2), round(count(name) / 1e6, 2)) == MAIN_PARAMETERS[name]


@pytest.mark.parametrize("name", MEGABYTE_PARAMETERS)
def test_megabyte_has_the_papers_parameters(name: str) -> None:
    (block_layers, width, _), (token_layers, local, _) = RUNS[name].stacks
    blocks, tokens = count_layers(name, "block_decoder"), count_layers(name, "token_decoder")
    assert (blocks, tokens) == (layers_by_formula(block_layers, width), layers_by_formula(token_layers, local))
    assert (round(blocks / 1e6, 2), round(tokens / 1e6, 2)) == MEGABYTE_PARAMETERS[name]
    expansion = 4 * local * width + 4 * local
    assert count(name) == blocks + tokens + expansion + VOCABULARY * (width // 4 + 2 * local)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("block_uptrain_b4_85_10", 41.0), ("block_uptrain_b4_300_10", 55.7), ("block_uptrain_b4_800_10", 119.8)],
)
def test_the_embedder_for_uptraining_has_a_full_table_and_a_projection(name: str, millions: float) -> None:
    width = RUNS[name].stacks[0][1]
    weights = VOCABULARY * width + 4 * width**2
    assert count(name, "embedder.") == weights + width  # and the bias of the projection
    assert round(weights / 1e6, 1) == millions


def test_cross_attention_adds_its_own_matrices_and_norm() -> None:
    """As many as the 99.2M of the T5 layers in the reference."""
    added = count_layers("block_ablation_b4_85_cls_cross_attn") - count_layers("block_ablation_b4_85_cls_sum")
    assert added == 6 * (4 * 768**2 + 6 * 768)
    assert round(count_layers("block_ablation_b4_85_cls_cross_attn") / 1e6, 1) == 99.2


def test_roberta_encoders_are_the_papers() -> None:
    layer = 12 * 256**2 + 13 * 256
    encoder = VOCABULARY * 256 + 514 * 256 + 256 + 2 * 256 + 3 * layer
    assert count("block_ablation_b4_85_roberta_prefix", "embedder.encoder.") == encoder
    assert count("block_ablation_b4_85_roberta_prefix", "embedder.projection.") == 4 * 256 * 768 + 768
    assert count("block_ablation_b4_85_cls_sum", "embedder.projection.") == 3 * 256 * 768 + 768
    with_encoder = [config_of(name).model.embedder for name in FILES if config_of(name).model.embedder.has_encoder]
    assert {embedder.roberta.dropout for embedder in with_encoder} == {0.0}


@pytest.mark.parametrize("name", [name for name, run in RUNS.items() if run.steps in (572000, 286000)])
def test_full_runs_see_300_billion_tokens(name: str) -> None:
    config = config_of(name)
    assert round(config.tokens_per_step * config.train.steps / 1e9, 1) == 299.9


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("block_main_b4_85_flop_v70", 139.6),
        ("block_main_b4_300_flop_v70", 51.4),
        ("block_main_b4_800_flop_v70", 20.2),
        ("block_main_b4_1.2b_flop_v70", 14.2),
        ("block_ablation_b4_85_lookup_prefix", 10.5),
        ("block_ablation_b4_85_cls_sum", 26.2),
        ("block_ablation_b4_85_prefix_8", 26.2),
        ("block_ratio_b4_300_1to1", 8.0),
        ("block_ratio_b4_800_1to1", 8.0),
        ("block_long_b4_85_8k", 28.8),
        ("vanilla_70_16k", 28.8),
    ],
)
def test_shorter_runs_see_the_papers_tokens(name: str, billions: float) -> None:
    config = config_of(name)
    assert round(config.tokens_per_step * config.train.last_step / 1e9, 1) == billions


@pytest.mark.parametrize("name", ["block_main_b4_85", "block_main_b4_300", "block_main_b4_800", "block_main_b4_1.2b"])
def test_equal_flop_runs_have_the_budget_of_the_vanilla_70m_model(name: str) -> None:
    """By the authors' formula: matrices of the layers and head, and attention at half."""

    def compute(layers: int, width: int, positions_per_token: float, length: int) -> float:
        return layers * positions_per_token * (12 * width**2 + 0.5 * length * width)

    layers, width, _ = RUNS[name].stacks[0]
    per_token = compute(layers, width, 1 / 4, 512) + compute(layers, width, 5 / 4, 5) + VOCABULARY * width
    run = config_of(f"{name}_flop_v70")
    budget = 572000 * 256 * 2048 * (compute(6, 512, 1, 2048) + VOCABULARY * 512)
    assert run.train.steps * run.tokens_per_step * per_token == pytest.approx(budget, rel=1.5e-3)


@pytest.mark.parametrize("size", ["85", "300", "800"])
def test_allocation_ratios_move_layers_only(size: str) -> None:
    total = 2 * RUNS[f"block_main_b4_{size}"].stacks[0][0]
    even = config_of(f"block_ratio_b4_{size}_1to1")
    for blocks, tokens in ((5, 1), (2, 1), (1, 1), (1, 2), (1, 5)):
        config = config_of(f"block_ratio_b4_{size}_{blocks}to{tokens}")
        layers = tuple(stack.num_layers for stack in config.model.stacks)
        nearest = min(range(1, total), key=lambda n: abs(n - total * blocks / (blocks + tokens)))
        assert layers == (nearest, total - nearest)
        assert count_layers(config.run.name) == count_layers(even.run.name)
        changes = {"num_layers": even.model.blocks.num_layers}
        evened = {
            "block_decoder": config.model.blocks.model_copy(update=changes),
            "token_decoder": config.model.tokens.model_copy(update=changes),
        }
        assert config.model.model_copy(update=evened) == even.model
        assert (config.train, config.optimizer, config.data) == (even.train, even.optimizer, even.data)


def test_sweeps_differ_in_one_setting() -> None:
    main = config_of("block_ablation_b4_85_lookup_prefix").model
    for length in (2, 8):
        assert config_of(f"block_ablation_b{length}_85").model == main.model_copy(update={"block_length": length})
    for prefix in (1, 2, 4, 8):
        swept = config_of(f"block_ablation_b4_85_prefix_{prefix}").model
        assert swept == main.model_copy(update={"prefix_length": prefix})
    long = config_of("block_main_b4_85")
    for name, length in (("8k", 8192), ("16k", 16384)):
        config = config_of(f"block_long_b4_85_{name}")
        assert config.model == long.model.model_copy(update={"sequence_length": length})
        assert config.tokens_per_step == long.tokens_per_step


@pytest.mark.parametrize(
    ("name", "layers", "width", "heads", "billions"),
    [("2.8b", 32, 2560, 32, 2.5), ("6.9b", 32, 4096, 32, 6.4), ("12b", 36, 5120, 40, 11.3)],
)
def test_large_models_halve_pythia(name: str, layers: int, width: int, heads: int, billions: float) -> None:
    model = config_of(f"block_main_b4_{name}").model
    assert {(s.num_layers, s.hidden_size, s.num_attention_heads) for s in model.stacks} == {(layers // 2, width, heads)}
    assert round(count_layers(f"block_main_b4_{name}") / 1e9, 1) == billions


def test_llama_examples_have_the_layers_of_their_sources() -> None:
    def layer(width: int, heads: int, groups: int, inner: int) -> int:
        head = width // heads
        return width * (heads + 2 * groups) * head + width * width + 3 * width * inner + 2 * width

    small, large = "block_uptrain_b4_smollm_135m", "block_uptrain_b4_llama_7b"
    assert count_layers(small) == 30 * layer(576, 9, 3, 1536) + 2 * 576
    assert count_layers(large) == 32 * layer(4096, 32, 32, 11008) + 2 * 4096
    assert "token_decoder.output.head.weight" not in parameters_of(config_of(small).model)
    # The sources' own counts: their layers, one norm, their tables.
    assert count_layers(small) - 576 + 49152 * 576 == 134_515_008
    assert count_layers(large) - 4096 + 2 * 32000 * 4096 == 6_738_415_616


@pytest.mark.parametrize("name", FILES)
def test_names_and_layouts(name: str) -> None:
    config = config_of(name)
    assert config.run.name == name
    if name != "block_main_b4_1.2b" and not name.startswith("quickstart"):
        assert config.parallel.world_size == 8
