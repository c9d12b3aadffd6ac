from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.streaming.mixture import MAXIMUM_PERIOD, Mixture, MixtureStage, shares_of

shares_lists = st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any)


@given(shares_lists, st.data())
def test_shares_are_exact_over_any_window(shares: list[int], data: st.DataObject) -> None:
    """Less than one sequence off at any time, so less than two over any window."""
    mixture = Mixture([MixtureStage(0, tuple(shares))])
    start = data.draw(st.integers(0, 10**7))
    length = data.draw(st.integers(1, 300))
    found = Counter(mixture.locate(position).source for position in range(start, start + length))
    for source, share in enumerate(shares):
        assert abs(found[source] - Fraction(share * length, sum(shares))) < 2
        if share:
            # Counted from the beginning: what the source has given before `start`.
            position = next(p for p in range(start, start + sum(shares) + 1) if mixture.locate(p).source == source)
            assert abs(mixture.locate(position).position - Fraction(share * position, sum(shares))) < 1


@given(
    st.lists(st.tuples(st.integers(1, 60), st.lists(st.integers(0, 7), min_size=3, max_size=3).filter(any)), max_size=5)
)
def test_every_source_is_read_on_without_gap_or_repetition(lengths: list[tuple[int, list[int]]]) -> None:
    begins, begin = [MixtureStage(0, (2, 0, 1))], 0
    for length, shares in lengths:
        begin += length
        begins.append(MixtureStage(begin, tuple(shares)))
    mixture = Mixture(begins)
    following = [0, 0, 0]
    for position in range(begin + 40):
        source, place = mixture.locate(position)
        assert place == following[source]
        following[source] += 1


def test_stages_change_the_shares_where_they_begin() -> None:
    mixture = Mixture([MixtureStage(0, (9, 1)), MixtureStage(90, (0, 1))])
    sources = [mixture.locate(position).source for position in range(100)]
    assert [sources[start : start + 10].count(1) for start in range(0, 90, 10)] == [1] * 9
    assert sources[90:] == [1] * 10


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ([0.9, 0.1], (9, 1)),
        ([1.0], (1,)),
        ([3.0, 0.0, 1.5], (2, 0, 1)),
        ([207e9, 31e9], (207, 31)),
        ([0.35, 0.001, 0.649], (350, 1, 649)),
    ],
)
def test_weights_become_whole_numbers(weights: list[float], shares: tuple[int, ...]) -> None:
    assert shares_of(weights) == shares


@given(st.lists(st.floats(0, 1e12, allow_subnormal=False), min_size=1, max_size=8).filter(any))
def test_weights_without_a_short_pattern_get_the_nearest(weights: list[float]) -> None:
    shares = shares_of(weights)
    assert 0 < sum(shares) <= MAXIMUM_PERIOD
    assert all((share > 0) == (weight > 0) for share, weight in zip(shares, weights, strict=True))
    exact = [Fraction(str(weight)) for weight in weights]
    for share, weight in zip(shares, exact, strict=True):
        # A slot for each tiny weight costs the largest share at most as many slots.
        assert abs(Fraction(share, sum(shares)) - weight / sum(exact)) <= Fraction(len(weights), MAXIMUM_PERIOD)


@given(shares_lists, st.lists(st.integers(1, 50), min_size=6, max_size=6))
def test_the_first_repetition_is_found(shares: list[int], counts: list[int]) -> None:
    mixture = Mixture([MixtureStage(0, tuple(shares))])
    counts = counts[: len(shares)]
    first = mixture.first_repetition(counts)
    places = [mixture.locate(position) for position in range(first + 1)]
    assert all(place < counts[source] for source, place in places[:-1])
    assert places[-1].position == counts[places[-1].source]


def test_the_order_of_sources_never_changes() -> None:
    """A run that goes on under a later version must see the same sequences."""
    mixture = Mixture([MixtureStage(0, (5, 3, 2))])
    assert [mixture.locate(position).source for position in range(10)] == [0, 1, 0, 2, 0, 1, 0, 1, 0, 2]
