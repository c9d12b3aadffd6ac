import gc
import warnings
from typing import Any

import pytest
import torch

from inference.errors import InferenceError
from inference.generator import Generator
from inference.kv_cache import KeyValueCache
from inference.sampling import SamplingConfig
from parallel.config import ModelConfig, ParallelConfig
from parallel.inputs import MicroBatch
from parallel.stage import Stage, build_stage
from parallel.topology import initialize_topology
from tests.golden_reference import BLOCK_VARIANTS, golden_stage
from tests.inference.models import PAD_ID, VOCAB_SIZE, forward_logits, random_prompt, small_config, small_stage
from tests.processes import run_processes
from train.selftest_models import MODELS, VARIANTS

GOLDEN_CASES = [
    *((name, "forward_greedy") for name in BLOCK_VARIANTS),
    ("prefix_r1_b4", "ref_generate"),
    ("vanilla", "ref_generate"),
]
SHAPES = [("block", 1, 1), ("block", 1, 3), ("block", 2, 2), ("block", 4, 1), ("block", 4, 2), ("vanilla", 4, 2)]
DRAWN = SamplingConfig(temperature=1.0, top_p=0.9, seed=5)


@pytest.mark.filterwarnings("ignore:prompt and new tokens")
@pytest.mark.parametrize(("name", "recorded"), GOLDEN_CASES)
def test_every_recorded_generation(name: str, recorded: str) -> None:
    golden, stage = golden_stage(name)
    stored = golden.generation
    cases = [key.removesuffix(".attention_mask") for key in stored if key.endswith(".attention_mask")]
    cases = [case for case in cases if case != "eos_stop"]
    assert "batch3_leftpad" in cases
    assert len(cases) >= 4
    for case in cases:
        masks = stored[f"{case}.attention_mask"].bool()
        prompts = [ids[mask].tolist() for ids, mask in zip(stored[f"{case}.prompt"], masks, strict=True)]
        expected = stored[f"{case}.{recorded}"][:, masks.shape[1] :].tolist()
        filled = {pad: Generator(stage, pad).generate(prompts, len(expected[0])) for pad in (0, 1)}
        # Before a RoBERTa encoder the reference fills a prompt up to whole blocks with id 1, but the recorded batch is
        # itself padded with id 0; every other embedder gets 0 for both.
        pads = [int(golden.config.embedder.has_encoder and bool(mask.all())) for mask in masks]
        assert [filled[pad][row] for row, pad in enumerate(pads)] == expected, case


def check_teacher_forced(stage: Stage, prompt: list[int], tokens: list[int]) -> None:
    """Every token is the most likely one of a training forward pass over the tokens before it."""
    logits = forward_logits(stage, prompt, tokens)
    chosen = logits.gather(1, torch.tensor(tokens)[:, None]).squeeze(1)
    assert bool((chosen >= logits.amax(dim=1) - 1e-4).all()), (prompt, tokens)


@pytest.mark.parametrize(("architecture", "length", "prefix"), SHAPES)
def test_mixed_lengths_follow_the_training_forward_pass(architecture: Any, length: int, prefix: int) -> None:
    check_mixed_lengths(small_stage(small_config(architecture, length, prefix)))


@pytest.mark.filterwarnings("ignore:prompt and new tokens")
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_follow_the_training_forward_pass(name: str) -> None:
    shape = {"vocab_size": VOCAB_SIZE, "initializer_std": 0.6}
    check_mixed_lengths(small_stage(MODELS[name].model_copy(update=shape)))


def check_mixed_lengths(stage: Stage) -> None:
    length = stage.model_config.unit_length
    prompts = [random_prompt(n) for n in (*range(1, 2 * length + 2), 5 * length + 1)]
    count = max(2 * length + 1, 9)
    together = Generator(stage, PAD_ID).generate(prompts, count)
    for prompt, tokens in zip(prompts, together, strict=True):
        assert len(tokens) == count
        check_teacher_forced(stage, prompt, tokens)
        assert Generator(stage, PAD_ID).generate([prompt], count) == [tokens]
    assert len({token for tokens in together for token in tokens}) > 2, "the text is trivial"


@pytest.mark.parametrize("sampling", [SamplingConfig(), DRAWN])
@pytest.mark.parametrize(("architecture", "length"), [("block", 4), ("block", 1), ("vanilla", 1)])
def test_neighbours_do_not_matter(architecture: Any, length: int, sampling: SamplingConfig) -> None:
    stage = small_stage(small_config(architecture, length))
    generator = Generator(stage, PAD_ID)
    prompt = random_prompt(6)
    alone = generator.generate([prompt], 13, sampling)[0]
    for neighbour in (random_prompt(1), random_prompt(6, seed=1), random_prompt(15), prompt):
        assert generator.generate([prompt, neighbour], 13, sampling)[0] == alone
    changed_end = [*random_prompt(15)[:-1], (random_prompt(15)[-1] + 1) % VOCAB_SIZE]
    first, second = (generator.generate([prompt, other], 13, sampling) for other in (random_prompt(15), changed_end))
    assert first[0] == second[0]
    assert first[1] != second[1]


def test_copies_of_a_prompt_are_drawn_independently() -> None:
    generator = Generator(small_stage(small_config()), PAD_ID)
    first, second = generator.generate([random_prompt(5)] * 2, 12, DRAWN)
    assert first != second
    assert generator.generate([random_prompt(5)] * 2, 12, DRAWN) == [first, second]
    assert generator.generate([random_prompt(5)], 12, DRAWN.model_copy(update={"seed": 6})) != [first]


@pytest.mark.parametrize(("architecture", "length"), [("block", 4), ("block", 1), ("vanilla", 1)])
def test_exactly_as_many_tokens_as_asked_for(architecture: Any, length: int) -> None:
    generator = Generator(small_stage(small_config(architecture, length)), PAD_ID)
    longest = generator.generate([random_prompt(3), random_prompt(4)], 9)
    for count in range(10):
        assert generator.generate([random_prompt(3), random_prompt(4)], count) == [row[:count] for row in longest]
    assert generator.generate([], 5) == []


@pytest.mark.parametrize(("architecture", "length"), [("block", 4), ("block", 1), ("vanilla", 1)])
def test_end_of_text_stops_one_sequence_and_not_the_others(architecture: Any, length: int) -> None:
    generator = Generator(small_stage(small_config(architecture, length)), PAD_ID)
    prompts = [random_prompt(n) for n in (3, 4, 9)]
    free = generator.generate(prompts, 14, DRAWN)
    seen = set()
    for eos_id in range(VOCAB_SIZE):
        expected = [row[: row.index(eos_id) + 1] if eos_id in row else row for row in free]
        assert generator.generate(prompts, 14, DRAWN, eos_id) == expected
        seen |= {len(row) for row in expected}
    assert len(seen) > 5, "stops inside blocks and at their ends"


def test_ids_beyond_the_tokenizer_are_never_generated() -> None:
    stage = small_stage(small_config())
    tokens = Generator(stage, PAD_ID).generate([random_prompt(5)], 24, DRAWN)[0]
    limit = sorted(set(tokens))[len(set(tokens)) // 2]
    limited = Generator(stage, pad_id=0, vocab_size=limit).generate([random_prompt(5)], 24, DRAWN)[0]
    assert max(tokens) >= limit > max(limited)


def test_impossible_requests_are_explained() -> None:
    stage = small_stage(small_config())
    generator = Generator(stage, PAD_ID)
    with pytest.raises(InferenceError, match="prompt 1 is empty"):
        generator.generate([[1], []], 4)
    with pytest.raises(InferenceError, match="prompt 0 holds token id 48, the model knows 0 to 47"):
        generator.generate([[1, 48]], 4)
    with pytest.raises(InferenceError, match="token id -1"):
        generator.generate([[-1]], 4)
    with pytest.raises(InferenceError, match="max_new_tokens=-1"):
        generator.generate([[1]], -1)
    with pytest.raises(InferenceError, match="pad_id=48"):
        Generator(stage, 48)
    with pytest.raises(InferenceError, match="vocab_size=49"):
        Generator(stage, 0, vocab_size=49)
    half = build_stage(small_config(), ParallelConfig(pipeline=2), pipeline_rank=1)
    with pytest.raises(InferenceError, match="pipeline=1"):
        Generator(half, 0)
    damaged = small_stage(small_config())
    torch.nn.init.constant_(damaged.get_parameter("token_decoder.output.norm.bias"), torch.nan)
    with pytest.raises(InferenceError, match="not finite"):
        Generator(damaged, PAD_ID).generate([[1]], 4)


def test_generation_beyond_the_trained_length_warns_once() -> None:
    generator = Generator(small_stage(small_config()), PAD_ID)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        generator.generate([random_prompt(2)], 30)
    with pytest.warns(UserWarning, match="model.sequence_length=32"):
        generator.generate([random_prompt(2)], 31)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        generator.generate([random_prompt(2)], 31)


@pytest.mark.filterwarnings("ignore:prompt and new tokens")
def test_generation_leaves_training_possible() -> None:
    """What generation caches, such as rotary tables, may be used by autograd later."""
    stage = small_stage(small_config())
    Generator(stage, PAD_ID).generate([random_prompt(60)], 1)
    ids = torch.tensor([random_prompt(64)])
    stage(MicroBatch(ids, torch.ones_like(ids, dtype=torch.bool))).sum().backward()
    assert all(parameter.grad is not None for parameter in stage.parameters())


def _generate_in_parallel(cases: list[tuple[ModelConfig, SamplingConfig]], prompts: list[list[int]]) -> list[Any]:
    parallel = ParallelConfig(tensor=2)
    initialize_topology(parallel)
    stages = [build_stage(config, parallel, seed=1) for config, _ in cases]
    results: list[Any] = [
        Generator(stage, PAD_ID).generate(prompts, 11, sampling)
        for stage, (_, sampling) in zip(stages, cases, strict=True)
    ]
    split = ParallelConfig(tensor=2, sequence_parallel=True)
    try:
        Generator(build_stage(cases[0][0], split), PAD_ID)
    except InferenceError as error:
        results.append(str(error))
    return results


def test_tensor_parallel_generation_equals_unsharded() -> None:
    configs = [small_config(length=4), small_config(length=1), small_config("vanilla")]
    cases = [(config, sampling) for config in configs for sampling in (SamplingConfig(), DRAWN)]
    prompts = [random_prompt(n) for n in (1, 6, 9)]
    expected = [Generator(small_stage(config), PAD_ID).generate(prompts, 11, sampling) for config, sampling in cases]
    for results in run_processes(2, _generate_in_parallel, cases, prompts):
        assert results[:-1] == expected
        assert "sequence_parallel=false" in results[-1]


@pytest.mark.parametrize("architecture", ["block", "vanilla"])
def test_a_sequence_with_its_own_seed_does_not_depend_on_its_place(architecture: Any) -> None:
    generator = Generator(small_stage(small_config(architecture)), PAD_ID)
    prompts = [random_prompt(n) for n in (3, 9, 5)]
    configs = [SamplingConfig(temperature=1.0, top_k=9, seed=3), SamplingConfig(), DRAWN]
    together = generator.generate(prompts, 11, configs)
    assert generator.generate(prompts[::-1], 11, configs[::-1]) == together[::-1]
    assert [
        generator.generate([prompt], 11, [one])[0] for prompt, one in zip(prompts, configs, strict=True)
    ] == together
    with pytest.raises(InferenceError, match="2 sampling configurations were given for 3 prompts"):
        generator.generate(prompts, 11, configs[:2])


def test_tokens_are_told_as_they_come() -> None:
    generator = Generator(small_stage(small_config()), PAD_ID)
    told: list[tuple[int, int]] = []
    prompts = [random_prompt(3), random_prompt(8)]
    made = generator.generate(prompts, 7, on_token=lambda place, token: told.append((place, token)))
    assert [place for place, _ in told] == [0, 1] * 7
    assert [[token for place, token in told if place == one] for one in (0, 1)] == made


def test_whoever_listens_may_end_a_sequence() -> None:
    generator = Generator(small_stage(small_config()), PAD_ID)
    prompts = [random_prompt(3), random_prompt(8)]
    whole = generator.generate(prompts, 7)
    ended = generator.generate(prompts, 7, on_token=lambda place, token: place == 1 and token == whole[1][2])
    assert ended == [whole[0], whole[1][: whole[1].index(whole[1][2]) + 1]]


@pytest.mark.parametrize("name", ["block", "vanilla", "Llama", "vanilla, multi-query", "MEGABYTE"])
@pytest.mark.filterwarnings("ignore:prompt and new tokens")
def test_the_cache_is_as_large_as_the_formula_says(name: str) -> None:
    """2 n D T values per sequence, of T tokens or T / L blocks; and of the P + L - 1 positions of one block."""
    config = MODELS[name]
    generator = Generator(small_stage(config), PAD_ID)
    prompt, new, sequences = 16, 16, 3
    generator.generate([random_prompt(prompt)] * sequences, new)

    def values(stack: Any, positions: int) -> int:
        return 2 * stack.num_layers * stack.key_value_heads * stack.head_size * positions

    if config.is_block:
        expected = values(config.blocks, (prompt + new) // config.block_length)
        expected += values(config.tokens, config.local_length)
    else:
        expected = values(config.vanilla, prompt + new)
    assert generator.cache_bytes == sequences * expected * 4


@pytest.mark.parametrize("architecture", ["block", "vanilla"])
def test_keys_and_values_are_given_back_however_a_batch_ends(architecture: Any) -> None:
    """Those of an earlier batch would take room from the next one, and from whatever else is on the device."""
    generator = Generator(small_stage(small_config(architecture)), PAD_ID)

    def held() -> int:
        gc.collect()
        return sum(one.bytes for one in gc.get_objects() if type(one) is KeyValueCache)

    def interrupt(place: int, token: int) -> None:
        raise KeyboardInterrupt

    generator.generate([random_prompt(8)] * 2, 8)
    assert generator.cache_bytes > 0
    assert held() == 0
    with pytest.raises(KeyboardInterrupt):
        generator.generate([random_prompt(8)] * 2, 8, on_token=interrupt)
    assert held() == 0


def test_whoever_runs_out_of_memory_gets_one_sentence() -> None:
    generator = Generator(small_stage(small_config()), PAD_ID)

    def fill(place: int, token: int) -> None:
        torch.empty(2**60, dtype=torch.uint8)

    def fail(place: int, token: int) -> None:
        raise RuntimeError("something else")

    with pytest.raises(InferenceError, match=r"^2 sequences at a time do not fit into memory .*; generate fewer"):
        generator.generate([random_prompt(4)] * 2, 8, on_token=fill)
    with pytest.raises(RuntimeError, match="something else"):
        generator.generate([random_prompt(4)] * 2, 8, on_token=fail)
