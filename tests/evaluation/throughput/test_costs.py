from pathlib import Path

import pytest

from evaluation.throughput.costs import Workload, decoding_costs, prompt_costs
from parallel.config import ModelConfig
from train.config_file import load_config

CONFIGS = Path(__file__).resolve().parents[3] / "configs" / "paper"
# Keys and values in MiB of 2,176 tokens in bf16 (the formula of section 2.4), and MFLOP per decoded token: twice the
# weights that a token goes through, and attention.
PAPER = [
    ("vanilla_31", 12.75),
    ("vanilla_410", 204.0),
    ("block_main_b4_5", 1.61),
    ("block_main_b4_300", 25.8),
    ("block_main_b4_1.2b", 51.6),
]


def paper_model(name: str) -> ModelConfig:
    return load_config(CONFIGS / f"{name}.yaml").model


@pytest.mark.parametrize(("name", "mebibytes"), PAPER)
def test_cache_of_the_paper(name: str, mebibytes: float) -> None:
    work = Workload(paper_model(name), 1, 128, 2048, value_bytes=2)
    assert work.cache_bytes_per_sequence / 2**20 == pytest.approx(mebibytes, rel=0.005)


def test_steps_and_tokens_add_up() -> None:
    for name in ("block_main_b4_5", "vanilla_31"):
        for prompt, new in ((128, 256), (130, 257), (1, 3)):
            steps = decoding_costs(Workload(paper_model(name), 8, prompt, new, 4))
            counts = [(component, count) for component, _, count in steps]
            assert ("head", new - 1) in counts, "the first token comes with the prompt"
            made = sum(count for component, count in counts if component in ("token decoder", "layers"))
            assert made == new - 1


def test_weights_are_read_once_for_the_batch_and_caches_by_each() -> None:
    model = paper_model("vanilla_31")
    works = (Workload(model, size, 128, 256, 4) for size in (1, 32))
    one, many = ({name: cost for name, cost, _ in decoding_costs(work)} for work in works)
    assert one["head"].moved_bytes == many["head"].moved_bytes == 50304 * 256 * 4
    assert many["head"].flops == 32 * one["head"].flops == 32 * 2 * 50304 * 256
    cached = 2 * 6 * 256 * 4 * (129 + 254 / 2)  # keys and values of six layers behind 129 to 383 tokens
    assert (many["layers"].moved_bytes - one["layers"].moved_bytes) / 31 == pytest.approx(cached)


def test_a_block_model_reads_a_block_decoder_once_per_block_and_a_token_decoder_once_for_a_prompt() -> None:
    work = Workload(paper_model("block_main_b4_5"), 4, 128, 256, 4)
    steps = decoding_costs(work)
    assert [count for name, _, count in steps if name == "block decoder"] == [63]
    assert [count for name, _, count in steps if name == "token decoder"] == [63, 192]
    prompt = prompt_costs(work)
    assert set(prompt) == {"embedder", "block decoder", "expansion", "token decoder", "head"}
    assert prompt["embedder"].flops == 0  # a table without projection
    # Whatever the length of the prompt, the first token takes one step of the token decoder.
    longer = prompt_costs(Workload(work.model, 4, 1024, 256, 4))
    assert [name for name in prompt if longer[name] != prompt[name]] == ["block decoder"]
    first_step = next(cost for name, cost, _ in steps if name == "token decoder")
    assert prompt["token decoder"] == first_step
    assert prompt_costs(Workload(paper_model("vanilla_31"), 4, 128, 256, 4))["head"].flops == 4 * 2 * 50304 * 256


def test_tokens_of_a_block_read_what_the_block_holds_so_far() -> None:
    """The tokens after the first read 3, 4 and 5 positions."""
    model = paper_model("block_main_b4_5")
    works = (Workload(model, size, 128, 256, 4) for size in (1, 5))
    one, five = (next(cost for name, cost, count in decoding_costs(work) if count == 192) for work in works)
    positions = 2 * 3 * 256 * 4  # bytes of keys and values of three layers
    assert (five.moved_bytes - one.moved_bytes) / 4 == pytest.approx(4 * positions)
