from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inference.errors import InferenceError
from inference.sampling import RandomNumbers, Sampler, SamplingConfig, candidates, sampling_config

DRAWS = 20000
# Upper 0.1 % quantiles of the chi-square distribution by degrees of freedom.
CHI_SQUARE_LIMIT = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46, 7: 24.32}


def sampler_of(config: SamplingConfig, count: int) -> Sampler:
    numbers = [RandomNumbers(config.seed, place) for place in range(count)]
    return Sampler([config] * count, numbers, torch.device("cpu"))


def draw_counts(logits: torch.Tensor, config: SamplingConfig) -> np.ndarray:
    """How often each token comes out of DRAWS rows of the same logits."""
    tokens = sampler_of(config, DRAWS).choose(logits.expand(DRAWS, -1))
    return np.bincount(tokens.numpy(), minlength=logits.numel())


def naive_nucleus(probabilities: np.ndarray, top_p: float, top_k: int | None = None) -> np.ndarray:
    """The definition, token by token."""
    if top_k is not None:
        most_likely = sorted(range(len(probabilities)), key=lambda token: (-probabilities[token], token))[:top_k]
        probabilities = np.where(np.isin(np.arange(len(probabilities)), most_likely), probabilities, 0)
        probabilities = probabilities / probabilities.sum()
    kept = np.zeros_like(probabilities)
    reached = 0.0
    for token in sorted(range(len(probabilities)), key=lambda token: (-probabilities[token], token)):
        if reached >= top_p:
            break
        kept[token] = probabilities[token]
        reached += probabilities[token]
    return kept / kept.sum()


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [
        (1.0, 1.0, None),
        (0.5, 1.0, None),
        (2.0, 1.0, None),
        (1.0, 0.7, None),
        (1.7, 0.95, None),
        (1.0, 1.0, 3),
        (1.3, 0.8, 5),
        (1.0, 1.0, 99),
    ],
)
def test_draws_have_the_exact_distribution(temperature: float, top_p: float, top_k: int | None) -> None:
    logits = torch.tensor([1.0, -0.5, 0.3, 2.0, 0.3, -2.0, 1.2, 0.0])
    counts = draw_counts(logits, SamplingConfig(temperature=temperature, top_p=top_p, top_k=top_k, seed=3))
    weights = np.exp(logits.double().numpy() / temperature)
    expected = naive_nucleus(weights / weights.sum(), top_p, top_k) * DRAWS
    allowed = expected > 0
    assert not counts[~allowed].any()
    statistic = float(((counts[allowed] - expected[allowed]) ** 2 / expected[allowed]).sum())
    assert statistic < CHI_SQUARE_LIMIT[int(allowed.sum()) - 1]


def test_successive_draws_of_a_sequence_have_the_exact_distribution() -> None:
    logits = torch.tensor([[0.5, 0.2, 0.3]]).log()
    sampler = sampler_of(SamplingConfig(temperature=1.0, seed=1), 1)
    tokens = np.array([int(sampler.choose(logits)) for _ in range(4000)])
    expected = np.array([0.5, 0.2, 0.3])
    counts = np.bincount(tokens, minlength=3)
    assert ((counts - 4000 * expected) ** 2 / (4000 * expected)).sum() < CHI_SQUARE_LIMIT[2]
    pairs = np.bincount(3 * tokens[:-1] + tokens[1:], minlength=9)
    independent = 3999 * np.outer(expected, expected).ravel()
    assert ((pairs - independent) ** 2 / independent).sum() < 29.6, "successive draws depend on each other"


@given(
    weights=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    top_p=st.fractions(min_value=Fraction(1, 97), max_value=1, max_denominator=97),
)
def test_the_nucleus_is_the_smallest_set(weights: list[int], top_p: Fraction) -> None:
    """Rational probabilities decide exactly; a set that reaches top_p to the last digit is left to rounding."""
    total = sum(weights)
    order = sorted(range(len(weights)), key=lambda token: (-weights[token], token))
    reached = [Fraction(sum(weights[token] for token in order[: n + 1]), total) for n in range(len(order))]
    size = next(n for n, mass in enumerate(reached) if mass >= top_p) + 1
    probabilities, ids = candidates(torch.tensor([weights], dtype=torch.float64).log(), 1.0, float(top_p), None)
    kept = int((probabilities > 0).sum())
    if ids is None:  # all tokens, in the order of their ids
        assert top_p == 1
        torch.testing.assert_close(probabilities * total, torch.tensor([weights]).double())
        return
    assert kept == size or (top_p in reached and abs(kept - size) <= 1)
    assert ids[0, :kept].tolist() == order[:kept]
    torch.testing.assert_close(probabilities[0, :kept] * total, torch.tensor([weights]).double()[0, order[:kept]])


def test_ties_go_to_the_lower_id_and_a_set_may_reach_top_p_exactly() -> None:
    probabilities, ids = candidates(torch.zeros(1, 8), 1.0, 0.25, None)
    assert ids[0, probabilities[0] > 0].tolist() == [0, 1]
    assert set(np.flatnonzero(draw_counts(torch.zeros(8), SamplingConfig(temperature=1.0, top_p=0.25)))) == {0, 1}
    assert int(sampler_of(SamplingConfig(), 1).choose(torch.tensor([[0.0, 2.0, 2.0]]))) == 1


def test_a_low_temperature_or_a_small_nucleus_is_greedy() -> None:
    logits = torch.tensor([1.0, 80.0, 79.0, -300.0])
    for config in (SamplingConfig(temperature=1e-40), SamplingConfig(temperature=3.0, top_p=1e-6), SamplingConfig()):
        assert draw_counts(logits, config).tolist() == [0, DRAWS, 0, 0]


def test_the_seed_alone_decides() -> None:
    logits = torch.zeros(6, 1000)
    config = SamplingConfig(temperature=1.0, seed=4)
    torch.manual_seed(0)
    first = sampler_of(config, 6).choose(logits)
    torch.manual_seed(1)
    assert torch.equal(sampler_of(config, 6).choose(logits), first)
    assert torch.equal(sampler_of(config, 2).choose(logits[:2]), first[:2])
    assert len(set(first.tolist())) == 6
    other = sampler_of(SamplingConfig(temperature=1.0, seed=5), 6).choose(logits)
    assert not set(other.tolist()) & set(first.tolist())


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_bad_settings_are_one_sentence(bad: dict[str, float]) -> None:
    name, value = next(iter(bad.items()))
    with pytest.raises(InferenceError, match=f"^{name}={value} is not allowed: ") as caught:
        sampling_config(**bad)
    assert "\n" not in str(caught.value)


def test_each_sequence_draws_in_its_own_way() -> None:
    logits = torch.tensor([1.0, 0.9, 0.8, -5.0]).expand(4000, -1)
    kinds = (SamplingConfig(), SamplingConfig(temperature=1.0, top_k=2), SamplingConfig(temperature=1.0))
    configs = [kinds[row % 3] for row in range(4000)]
    numbers = [RandomNumbers(7, row) for row in range(4000)]
    tokens = Sampler(configs, numbers, torch.device("cpu")).choose(logits)
    assert [set(tokens[kind::3].tolist()) - {3} for kind in range(3)] == [{0}, {0, 1}, {0, 1, 2}]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_logit_that_is_no_number_is_an_error(bad: float) -> None:
    logits = torch.zeros(3, 5)
    logits[1, 2] = bad
    with pytest.raises(InferenceError, match="not finite"):
        sampler_of(SamplingConfig(), 3).choose(logits)
    logits[1, 2] = -float("inf")
    assert sampler_of(SamplingConfig(), 3).choose(logits).tolist() == [0, 0, 0]
