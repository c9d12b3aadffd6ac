import pytest

from evaluation.throughput.batch_search import RESERVE, Trial, bytes_per_sequence, search_batch_sizes

GIBIBYTE = 2**30


def search(per_sequence: float, free: int, largest: int = 2**16, fixed: int = 0) -> list[Trial]:
    def attempt(size: int) -> int | None:
        needed = int(fixed + per_sequence * size)
        return needed if needed <= free else None

    return search_batch_sizes(attempt, free, largest)


@pytest.mark.parametrize("per_sequence", [0.01 * GIBIBYTE, 0.3 * GIBIBYTE, 5 * GIBIBYTE])
@pytest.mark.parametrize("free", [16 * GIBIBYTE, 80 * GIBIBYTE])
def test_the_search_ends_close_to_the_limit(per_sequence: float, free: int) -> None:
    trials = search(per_sequence, free)
    assert [trial.batch_size for trial in trials[:2]] == [1, 2]
    sizes = [trial.batch_size for trial in trials]
    assert len(set(sizes)) == len(sizes) < 25
    best = max(trial.batch_size for trial in trials if trial.peak_bytes is not None)
    fits = int(free / per_sequence)
    assert best <= fits
    assert best >= 0.85 * (free - RESERVE) / per_sequence - 4


def test_sizes_are_round() -> None:
    for trial in search(0.004 * GIBIBYTE, 80 * GIBIBYTE):
        size = trial.batch_size
        multiple = 256 if size >= 2048 else 64 if size >= 512 else 16 if size >= 128 else 4 if size >= 32 else 1
        assert size % multiple == 0


def test_prediction_may_be_wrong() -> None:
    """Memory that grows faster than the first sizes tell: a size fails, and smaller ones are tried."""
    free = 16 * GIBIBYTE
    trials = search_batch_sizes(lambda size: n if (n := int(1e7 * size**1.5)) < free else None, free, 2**16)
    assert any(trial.peak_bytes is None for trial in trials)
    best = max(trial.batch_size for trial in trials if trial.peak_bytes is not None)
    assert 1e7 * (best * 1.2) ** 1.5 > free - RESERVE


def test_nothing_fits_and_limits() -> None:
    assert search(GIBIBYTE, 0) == [Trial(1, None)]
    assert [trial.batch_size for trial in search(1.0, 80 * GIBIBYTE, largest=1)] == [1]
    assert max(trial.batch_size for trial in search(1.0, 80 * GIBIBYTE, largest=40)) <= 40


def test_memory_per_sequence_is_a_slope() -> None:
    assert bytes_per_sequence([Trial(1, 110), Trial(2, 120), Trial(8, None), Trial(4, 140)]) == 10
    assert bytes_per_sequence([Trial(1, 110)]) == 110


def test_the_search_ends_when_less_than_the_reserve_is_free() -> None:
    """1 GiB for each sequence: with 8 of 9.5 GiB taken, it could go on to 9."""
    sizes = [trial.batch_size for trial in search(GIBIBYTE, int(9.5 * GIBIBYTE))]
    assert sizes == [1, 2, 6, 8]
