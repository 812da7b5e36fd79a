"""How sure a score is, and whether one model is really better than another.

Rates get Wilson intervals, means a bootstrap; two models are compared on the same items, by the exact McNemar test for
right and wrong, by a paired bootstrap for anything else, with Holm's correction over the tasks. "Adding Error Bars to
Evals" (Miller 2024, arXiv:2411.00640) explains why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Literal, NamedTuple

import numpy as np

CONFIDENCE = 0.95
ALPHA = 0.05
SMALLEST_SHOWN = 0.005
RESAMPLES = 10_000
SEED = 0
CHUNK_DRAWS = 4_000_000  # indices drawn at once: 32 MB

Verdict = Literal["better", "same", "worse"]


class Interval(NamedTuple):
    low: float
    high: float


class Difference(NamedTuple):
    """A second model against a first one, on the same items; `value` is second minus first."""

    value: float
    low: float
    high: float
    p: float  # two-sided


def wilson_interval(successes: int, n: int, confidence: float = CONFIDENCE) -> Interval:
    """Interval of a rate, as fractions of one; Wilson 1927. (0, 1) when there is nothing to go by."""
    if not n:
        return Interval(0.0, 1.0)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate, spread = successes / n, z * z / n
    centre = (rate + spread / 2) / (1 + spread)
    half = z * math.sqrt(rate * (1 - rate) / n + spread / (4 * n)) / (1 + spread)
    # at the ends the bound is exactly 0 or 1, which rounding would miss by an ulp
    return Interval(0.0 if not successes else centre - half, 1.0 if successes == n else centre + half)


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided p of the exact McNemar test: are `gained` and `lost` items a fair coin's heads and tails?

    Computed in whole numbers, so it is exact for any count. 1.0 where nothing changed.
    """
    n, fewer = gained + lost, min(gained, lost)
    if not n or 2 * fewer == n:
        return 1.0
    term = tail = 1
    for k in range(1, fewer + 1):
        term = term * (n - k + 1) // k
        tail += term
    return min(1.0, float_ratio(2 * tail, 2**n))


def float_ratio(numerator: int, denominator: int) -> float:
    """numerator / denominator, 0.0 where that is too small for a float."""
    try:
        return numerator / denominator
    except OverflowError:
        return 0.0


def compare_correct(first: Sequence[bool], second: Sequence[bool]) -> Difference:
    """Difference of two accuracies on the same items, in fractions of one, with McNemar's p.

    The interval is Wald's for paired proportions with Agresti and Min's adjustment (2005): half an item is added to
    each cell of the 2x2 table, so that it does not collapse where few items differ.
    """
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if a.shape != b.shape or not a.size:
        raise ValueError(f"found {a.size} and {b.size} items, expected the same ones, at least one")
    gained, lost = int((~a & b).sum()), int((a & ~b).sum())
    n, up, down = a.size + 2, gained + 0.5, lost + 0.5
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    centre, half = (up - down) / n, z * math.sqrt(up + down - (up - down) ** 2 / n) / n
    low, high = max(centre - half, -1.0), min(centre + half, 1.0)
    return Difference((gained - lost) / a.size, low, high, mcnemar(gained, lost))


def resampled_means(rows: np.ndarray, resamples: int = RESAMPLES, seed: int = SEED) -> np.ndarray:
    """Means over bootstrap samples of the rows: (N, C) -> (resamples, C). Memory does not grow with `resamples` * N."""
    rng = np.random.default_rng(seed)
    n = len(rows)
    means: np.ndarray = np.empty((resamples, rows.shape[1]))
    step = max(1, CHUNK_DRAWS // n)
    for at in range(0, resamples, step):
        count = min(step, resamples - at)
        draws = rng.integers(n, size=(count, n)) + n * np.arange(count)[:, None]
        times = np.bincount(draws.ravel(), minlength=count * n).reshape(count, n)
        means[at : at + count] = times @ rows / n
    return means


def bootstrap_interval(
    rows: np.ndarray, score: Callable[[np.ndarray], np.ndarray] = lambda means: means, seed: int = SEED
) -> list[Interval]:
    """Percentile intervals of scores that are functions of column means.

    Args:
        rows: (N, C), a row for each item.
        score: (R, C) means -> (R, S) scores.

    Returns:
        an interval for each of the S scores.
    """
    sampled = score(resampled_means(np.asarray(rows, dtype=np.float64), seed=seed))
    edges = np.quantile(sampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    return [Interval(float(low), float(high)) for low, high in edges.T]


def compare_scores(
    first: np.ndarray,
    second: np.ndarray,
    score: Callable[[np.ndarray], np.ndarray] = lambda means: means[:, 0],
    seed: int = SEED,
) -> Difference:
    """Paired bootstrap: the same resampled items for both models.

    Args:
        first, second: (N, C), a row for each item, the same items in the same order.
        score: (R, C) means -> (R,) scores.

    Returns:
        the difference with its percentile interval; p is twice the share of resamples on the far side of 0, where each
        side counts one more than was seen, so that it is never 0.
    """
    a, b = (np.asarray(rows, dtype=np.float64) for rows in (first, second))
    if a.shape != b.shape or not len(a):
        raise ValueError(f"found {len(a)} and {len(b)} items, expected the same ones, at least one")
    if np.array_equal(a, b):
        return Difference(0.0, 0.0, 0.0, 1.0)
    columns = a.shape[1]
    means = resampled_means(np.hstack([a, b]), seed=seed)
    found = score(means[:, columns:]) - score(means[:, :columns])
    value = float(score(b.mean(axis=0)[None])[0] - score(a.mean(axis=0)[None])[0])
    low, high = np.quantile(found, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    tail = 1 + min(int((found <= 0).sum()), int((found >= 0).sum()))
    return Difference(value, float(low), float(high), min(1.0, 2 * tail / (len(found) + 1)))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number; Holm 1979. In the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def verdict(difference: float, corrected_p: float, lower_is_better: bool = False) -> Verdict:
    """What a difference means, in the unit of its table; one that rounds to 0.00 there is none, however sure it is."""
    if corrected_p >= ALPHA or abs(difference) < SMALLEST_SHOWN:
        return "same"
    return "better" if (difference < 0) == lower_is_better else "worse"


def smallest_difference(n: int, discordant: float = 0.2, power: float = 0.8) -> float:
    """The accuracy difference that n paired items show with this power, if a share of them differs between the models.

    Normal approximation of the McNemar test, for a note beside "same": what a set of this size cannot see.
    """
    normal = NormalDist()
    return (normal.inv_cdf(1 - ALPHA / 2) + normal.inv_cdf(power)) * math.sqrt(discordant / n)
