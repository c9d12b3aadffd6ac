"""The C++ kernels against the same layers in torch."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inference.cached_layer import CachedStack
from inference.cpu_kernels import kernels, library
from inference.cpu_kernels.kernels import normed_linear_kernel, stack_kernel
from inference.generator import Generator
from inference.sampling import most_likely
from parallel.component_config import BackboneConfig, DecoderConfig
from parallel.config import ModelConfig
from parallel.decoder_layer import DecoderLayer
from tests.inference.models import PAD_ID, random_prompt, small_config, small_stage
from train.selftest_models import LLAMA, MODELS, QWEN2, QWEN3

NEOX = BackboneConfig()
# Heads of 8, 24 and 80 values, widths that no vector length divides, groups, and every part a layer may be made of.
STACKS: list[tuple[BackboneConfig, dict[str, Any]]] = [
    (NEOX, {"hidden_size": 64, "num_attention_heads": 2}),
    (NEOX, {"hidden_size": 40, "num_attention_heads": 5, "ffn_hidden_size": 70}),
    (NEOX.model_copy(update={"residual": "sequential", "rotary_fraction": 0.5}), {"attention_head_size": 24}),
    (NEOX.model_copy(update={"rotary_fraction": 0.0, "bias": "query_key_value"}), {"attention_head_size": 80}),
    (LLAMA, {"hidden_size": 56, "num_key_value_heads": 2, "ffn_hidden_size": 33}),
    (LLAMA.model_copy(update={"residual": "parallel"}), {"hidden_size": 72, "num_key_value_heads": 1}),
    (QWEN2, {"num_key_value_heads": 2, "attention_head_size": 12}),
    (QWEN3, {"attention_head_size": 10}),
]
CAPACITY = 60


def layers(backbone: BackboneConfig, options: dict[str, Any]) -> list[DecoderLayer]:
    """Two layers, none of whose parameters are 0 or 1."""
    decoder = DecoderConfig(**{"num_layers": 2, "hidden_size": 52, "num_attention_heads": 4} | options)
    config = ModelConfig(
        architecture="vanilla", decoder=decoder, backbone=backbone, vocab_size=48, sequence_length=CAPACITY
    )
    stage = small_stage(config)
    generator = torch.Generator().manual_seed(1)
    for parameter in stage.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return [stage.piece(f"vanilla.layers.{index}") for index in range(2)]  # type: ignore[misc]


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def stacks(monkeypatch: pytest.MonkeyPatch, modules: list[DecoderLayer]) -> tuple[CachedStack, CachedStack]:
    """The layers with kernels, and without."""
    quick = CachedStack(modules)
    assert stack_kernel(modules) is not None
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "load_kernels", lambda: None)
        plain = CachedStack(modules)
    return quick, plain


def left_padded(sequences: int, positions: int) -> Tensor:
    """Mask [B, 1, T, T] of prompts with ever less padding before them, where padding attends to itself."""
    padding = torch.arange(sequences).flip(0) % positions
    real = torch.arange(positions) >= padding[:, None]
    allowed = torch.ones(positions, positions, dtype=torch.bool).tril() & real[:, None]
    return (allowed | torch.eye(positions, dtype=torch.bool))[:, None]


@pytest.mark.parametrize(("backbone", "options"), STACKS)
def test_a_stack_equals_the_same_layers_in_torch(
    backbone: BackboneConfig, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = layers(backbone, options)
    both = stacks(monkeypatch, modules)
    width = modules[0].stack.hidden_size
    with torch.no_grad():
        for sequences, prompt in ((1, 1), (1, 40), (2, 2), (3, 3), (7, 13), (12, 25), (33, 12)):
            for padded in (False, True):
                mask = left_padded(sequences, prompt) if padded else None
                for stack in both:
                    stack.start(sequences, prompt + 3)
                for step in range(4):
                    hidden = torch.randn(sequences, 1 if step else prompt, width)
                    if step and mask is not None:
                        seen = torch.ones(sequences, 1, 1, step, dtype=torch.bool)
                        allowed: Tensor | None = torch.cat((mask[:, :, -1:], seen), dim=3)
                    else:
                        allowed = mask
                    found, expected = (stack(hidden, allowed) for stack in both)
                    assert_near(found, expected)
                # Full to the last position, and the same keys and values.
                assert both[0].cache.length == both[0].cache.capacity
                real = slice(None) if mask is None else slice(prompt - 1, None)
                assert_near(both[0].cache.memory[..., real, :], both[1].cache.memory[..., real, :])


def test_a_long_prompt_goes_through_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = layers(*STACKS[0])
    both = stacks(monkeypatch, modules)
    with torch.no_grad():
        for sequences, prompt in ((9, 100), (2, 300)):
            hidden = torch.randn(sequences, prompt, 64)
            for mask in (None, left_padded(sequences, prompt)):
                for stack in both:
                    stack.start(sequences, prompt)
                found, expected = (stack(hidden, mask) for stack in both)
                assert_near(found, expected)


def test_neither_neighbours_nor_threads_change_a_single_bit() -> None:
    modules = layers(*STACKS[0])
    stack = CachedStack(modules)
    hidden = torch.randn(33, 14, 64)
    results = []
    with torch.no_grad():
        for threads, sequences in ((1, 33), (2, 33), (3, 5), (1, 1)):
            torch.set_num_threads(threads)
            try:
                stack.start(sequences, 15)
                stack(hidden[:sequences, :13])
                results.append(stack(hidden[:sequences, 13:])[0])
            finally:
                torch.set_num_threads(1)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("bias", [True, False])
def test_a_norm_and_a_linear_layer(norm: type[nn.LayerNorm | nn.RMSNorm], bias: bool) -> None:
    with torch.no_grad():
        for inputs, outputs in ((1, 1), (16, 32), (52, 33), (100, 417)):
            first, second = norm(inputs, eps=1e-4), nn.Linear(inputs, outputs, bias=bias)
            first.weight.normal_()
            kernel = normed_linear_kernel(first, second)
            assert kernel is not None
            for rows in (*range(1, 34), 100):
                hidden = torch.randn(rows, inputs + 1)[:, 1:] + 0.5
                assert_near(kernel(hidden), second(first(hidden)))


def test_the_most_likely_token() -> None:
    generator = torch.Generator().manual_seed(0)
    for columns in (1, 5, 255, 256, 257, 1000, 5000):
        for rows in (1, 2, 5):
            # Few different values, so that many are equal; and logits that are part of longer rows.
            logits = torch.randint(0, 9, (rows, columns + 3), generator=generator).float()[:, :columns]
            logits[:, : columns // 2] = -math.inf
            highest, places = most_likely(logits)
            assert torch.equal(highest, logits.amax(dim=1))
            assert torch.equal(places, logits.argmax(dim=1))
            for place in {0, columns // 2, columns - 1}:
                damaged = logits.clone()
                damaged[-1, place] = math.nan
                highest, places = most_likely(damaged)
                assert highest.isnan().tolist() == [False] * (rows - 1) + [True]
                assert 0 <= int(places.min()) <= int(places.max()) < columns
    assert most_likely(torch.full((1, 600), -math.inf))[1].tolist() == [0]
    assert 0 <= int(most_likely(torch.full((1, 600), math.nan))[1]) < 600


def test_what_has_no_kernel() -> None:
    stage = small_stage(MODELS["cross-attention"])
    assert stack_kernel([stage.piece("token_decoder.layers.0")]) is None  # type: ignore[list-item]
    linear = nn.Linear(4, 4, dtype=torch.bfloat16)
    assert normed_linear_kernel(nn.LayerNorm(4, dtype=torch.bfloat16), linear) is None


@pytest.mark.parametrize("trouble", ["no compiler", "no valid library"])
def test_without_the_library_generation_goes_on(
    trouble: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = small_stage(small_config())
    expected = Generator(stage, PAD_ID).generate([random_prompt(5)], 9)
    if trouble == "no compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    else:
        damaged = tmp_path / "damaged.so"
        damaged.write_bytes(library.build_kernels().read_bytes()[:64])
        monkeypatch.setattr(library, "build_kernels", lambda: damaged)
    library.load_kernels.cache_clear()
    try:
        assert Generator(stage, PAD_ID).generate([random_prompt(5)], 9) == expected
    finally:
        library.load_kernels.cache_clear()
    [warning] = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: generation on CPU goes on slowly, without its C++ kernels: ")
    assert ("apt-get install g++" if trouble == "no compiler" else "damaged.so") in warning
