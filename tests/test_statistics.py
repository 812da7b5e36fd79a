"""Intervals and tests against published numbers, direct sums and simulations."""

import math

import numpy as np
import pytest

from suwen import statistics


def test_wilson_interval_of_a_published_accuracy():
    # 42.8 % of 6,811: 41.6 to 44.0
    low, high = statistics.wilson_interval(round(0.428 * 6811), 6811)
    assert (round(low, 3), round(high, 3)) == (0.416, 0.440)
    assert statistics.wilson_interval(0, 10) == (0.0, pytest.approx(0.2775, abs=1e-4))
    assert statistics.wilson_interval(10, 10)[1] == 1.0
    assert statistics.wilson_interval(0, 0) == (0, 1)


def test_wilson_bounds_solve_the_score_equation():
    for k, n in ((3, 20), (50, 60), (1, 2)):
        for bound in statistics.wilson_interval(k, n):
            z = (k / n - bound) / math.sqrt(bound * (1 - bound) / n)
            assert abs(z) == pytest.approx(1.959964, abs=1e-5)


@pytest.mark.parametrize("gained, lost", [(0, 0), (5, 0), (8, 2), (3, 9), (40, 60), (7, 7)])
def test_mcnemar_is_the_binomial_sum(gained, lost):
    n, m = gained + lost, min(gained, lost)
    expected = min(1.0, 2 * sum(math.comb(n, k) for k in range(m + 1)) / 2**n)
    assert statistics.mcnemar(gained, lost) == pytest.approx(expected, rel=1e-12)


def test_mcnemar_of_thousands_is_exact_and_never_overflows():
    assert statistics.mcnemar(3000, 3000) == 1.0
    assert statistics.mcnemar(5000, 0) == 0.0
    z = (90 - 1) / math.sqrt(600)  # normal approximation with continuity correction
    assert statistics.mcnemar(345, 255) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.05)


def test_holm_of_textbook_values():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.6, 0.7]) == [1.0, 1.0]
    assert statistics.holm([]) == []


def planted(points, n=3000, noise=0.1, seed=0):
    """Right or wrong of two models on the same items, the second one `points` percentage points worse."""
    rng = np.random.default_rng(seed)
    first = np.zeros(n, dtype=bool)
    first[: n // 2] = True
    rng.shuffle(first)
    second = first.copy()
    right, wrong = np.flatnonzero(first), np.flatnonzero(~first)
    swaps, more = round(noise * n), round(points * n / 100)
    second[rng.choice(right, swaps + more, replace=False)] = False
    second[rng.choice(wrong, swaps, replace=False)] = True
    return first, second


def test_a_planted_regression_is_worse_and_no_change_is_the_same():
    first, second = planted(3)
    difference = statistics.compare_correct(first, second)
    assert difference.value == pytest.approx(-0.03)
    assert difference.low < -0.03 < difference.high < 0
    assert statistics.verdict(difference.value, statistics.holm([difference.p] + [1.0] * 4)[0]) == "worse"
    back = statistics.compare_correct(second, first)
    assert statistics.verdict(back.value, back.p) == "better"
    for pair in ((first, first), planted(0, seed=3)):
        difference = statistics.compare_correct(*pair)
        assert statistics.verdict(difference.value, difference.p) == "same"


def test_identical_models_are_called_different_in_few_simulations():
    verdicts = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        first, second = rng.random((2, 400)) < 0.4
        difference = statistics.compare_correct(first, second)
        verdicts.append(statistics.verdict(difference.value, difference.p) != "same")
    assert sum(verdicts) <= 0.05 * 200 + 2 * math.sqrt(200 * 0.05 * 0.95)


def test_bootstrap_interval_of_a_mean_is_the_normal_one():
    values = np.random.default_rng(0).normal(5, 2, size=(400, 1))
    [(low, high)] = statistics.bootstrap_interval(values)
    half = 1.96 * values.std() / 20
    assert (low, high) == (pytest.approx(values.mean() - half, abs=0.02), pytest.approx(values.mean() + half, abs=0.02))


def test_paired_bootstrap_sees_what_pairing_shows():
    rng = np.random.default_rng(0)
    first = rng.normal(0, 10, size=(300, 1))  # items differ far more than models do
    second = first + 0.5 + rng.normal(0, 1, size=(300, 1))
    difference = statistics.compare_scores(first, second)
    assert difference.p < 0.001 and 0.3 < difference.low < difference.value < difference.high < 0.7
    assert statistics.compare_scores(first, first) == (0, 0, 0, 1)
    assert statistics.compare_scores(first, second[::-1]).p > 0.05
    with pytest.raises(ValueError, match="the same ones"):
        statistics.compare_scores(first, second[:9])


def test_memory_of_a_bootstrap_does_not_depend_on_the_chunks():
    rows = np.random.default_rng(0).random((50, 2))
    assert statistics.resampled_means(rows, 100).shape == (100, 2)
    assert statistics.resampled_means(rows, 4000).mean(axis=0) == pytest.approx(rows.mean(axis=0), abs=0.01)


def test_a_verdict_knows_scores_where_less_is_more():
    assert statistics.verdict(-1.0, 0.01, lower_is_better=True) == "better"
    assert statistics.verdict(-1.0, 0.2, lower_is_better=True) == "same"


def test_a_difference_that_a_table_shows_as_nothing_is_none():
    assert statistics.verdict(0.004, 0.0001) == "same"
    assert statistics.verdict(0.006, 0.0001) == "better"


def test_the_smallest_difference_that_a_set_shows():
    # facts: 1.5 points at 6,811 items, 4.0 at 1,000, 7.2 at 300
    found = [round(100 * statistics.smallest_difference(n), 1) for n in (6811, 1000, 300)]
    assert found == [1.5, 4.0, 7.2]
