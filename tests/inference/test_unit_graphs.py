"""Decoding unit by unit, as CUDA graphs record it, here run without recording: the same tokens as one by one."""

from typing import Any

import pytest

from inference.errors import InferenceError
from inference.generator import Generator
from inference.sampling import SamplingConfig
from inference.unit_graphs import SPAN
from tests.inference.models import PAD_ID, VOCAB_SIZE, random_prompt, small_config, small_stage
from train.selftest_models import MODELS, VARIANTS

DRAWN = SamplingConfig(temperature=1.0, top_p=0.9, top_k=20, seed=5)
MIXED = [SamplingConfig(), DRAWN, SamplingConfig(temperature=0.7, seed=2), DRAWN, SamplingConfig()]


@pytest.mark.filterwarnings("ignore:prompt and new tokens")
@pytest.mark.parametrize(("architecture", "length", "prefix"), [("block", 1, 1), ("block", 4, 2), ("vanilla", 1, 1)])
def test_units_make_the_same_tokens_over_several_spans(architecture: Any, length: int, prefix: int) -> None:
    stage = small_stage(small_config(architecture, length, prefix))
    one_by_one, units = (Generator(stage, PAD_ID, graphs=graphs) for graphs in (False, True))
    prompts = [random_prompt(n) for n in (3, 4, 9, 10, 1)]
    # Even blocks of four go over the first span.
    count = 2 * SPAN * length + 3
    for sampling in (MIXED, SamplingConfig()):
        assert units.generate(prompts, count, sampling) == one_by_one.generate(prompts, count, sampling)


@pytest.mark.filterwarnings("ignore:prompt and new tokens")
@pytest.mark.parametrize("name", VARIANTS)
def test_units_of_every_variant(name: str) -> None:
    stage = small_stage(MODELS[name].model_copy(update={"vocab_size": VOCAB_SIZE, "initializer_std": 0.6}))
    prompts = [random_prompt(n) for n in (3, 4, 9)]
    expected = Generator(stage, PAD_ID, graphs=False).generate(prompts, 19)
    assert Generator(stage, PAD_ID, graphs=True).generate(prompts, 19) == expected


@pytest.mark.parametrize("architecture", ["block", "vanilla"])
def test_units_end_where_asked_for(architecture: Any) -> None:
    stage = small_stage(small_config(architecture))
    one_by_one, units = (Generator(stage, PAD_ID, graphs=graphs) for graphs in (False, True))
    prompts = [random_prompt(3), random_prompt(8)]
    for count in range(1, 14):
        assert units.generate(prompts, count, DRAWN) == one_by_one.generate(prompts, count, DRAWN)
    for eos_id in range(0, VOCAB_SIZE, 5):
        assert units.generate(prompts, 14, DRAWN, eos_id) == one_by_one.generate(prompts, 14, DRAWN, eos_id)


def test_damaged_weights_are_noticed_in_units() -> None:
    stage = small_stage(small_config())
    generator = Generator(stage, PAD_ID, graphs=True)
    heard = []

    def damage(place: int, token: int) -> None:
        heard.append(token)
        if len(heard) == 8:
            stage.piece("token_decoder.output").norm.weight.data.fill_(float("nan"))  # type: ignore[union-attr, operator]

    with pytest.raises(InferenceError, match="not finite"):
        generator.generate([random_prompt(4)], 16, on_token=damage)
    assert len(heard) == 8, "two whole blocks"
