"""The learning rate at the corners of its schedule."""

import pytest

from train.config import OptimizerConfig
from train.schedule import learning_rate

PAPER = OptimizerConfig(learning_rate=2e-4, warmup_steps=1500)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (1, 2e-4 / 1500),
        (750, 1e-4),
        (1500, 2e-4),
        (1500 + (286_000 - 1500) // 2, 1.1e-4),  # half of the cosine: midway between peak and a tenth of it
        (286_000, 2e-5),
        (300_000, 2e-5),
    ],
)
def test_warmup_then_cosine_to_a_tenth(step: int, expected: float) -> None:
    assert learning_rate(PAPER, step, 286_000) == pytest.approx(expected, rel=1e-9)


def test_without_warmup_the_first_step_is_almost_at_the_peak() -> None:
    rates = [learning_rate(OptimizerConfig(learning_rate=1.0), step, 100) for step in range(1, 101)]
    assert rates[0] == pytest.approx(1.0, abs=1e-3)
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(0.1)
