"""Percentile bootstrap over items: intervals, and the difference of two systems over the same items."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Indices drawn at once: bounds the memory.
BLOCK = 2**22
# From so many items per distinct value on, counts of the values are drawn instead of items.
ITEMS_PER_VALUE = 16


@dataclass(frozen=True)
class Difference:
    """
    First less second.

    Args:
        mean: of the differences of the items; as a ratio of sums where there are denominators. nan without items.
        low, high: its percentile interval; nan with fewer than two items.
        p: two-sided: twice the share of resamples on the other side of 0 (or at 0), each count raised by one so that p is
            never 0, at most 1; nan with fewer than two items.
        n: items both systems have.
        left_out: items where either is nan, which are not compared.
    """

    mean: float
    low: float
    high: float
    p: float
    n: int
    left_out: int


def interval(
    values: Sequence[float], denominators: Sequence[float] | None = None, *, samples: int = 10_000,
    confidence: float = 0.95, seed: int = 0,
) -> tuple[float, float]:  # fmt: skip
    """
    Percentile interval of the mean, or of a ratio of sums such as overall R@1 (hits over gold items).

    Items are drawn with replacement, as many as there are; the interval lies between the quantiles of the statistic over
    the draws. The same arguments give the same interval.

    Args:
        values: `(n,)`, one per item; nan where it has no value, which is left out.
        denominators: `(n,)`, at least 0, for `sum(values) / sum(denominators)`; an item with a nan in either is left out.
            A draw whose denominators sum to 0 has no ratio and does not count.

    Returns:
        `low, high`; `nan, nan` with fewer than two items, which have no spread.

    Raises:
        ValueError: shapes differ, an infinite value, a negative denominator, `samples` < 1, or `confidence` outside 0..1.
    """
    values, weights = _items(values, denominators)
    kept = ~np.isnan(values + weights)
    low, high, _ = _bootstrap(values[kept], weights[kept], samples, confidence, seed)
    return low, high


def paired(
    a: Sequence[float], b: Sequence[float], denominators: Sequence[float] | None = None, *, samples: int = 10_000,
    confidence: float = 0.95, seed: int = 0,
) -> Difference:  # fmt: skip
    """
    Compares two systems on the same items: both get the same draws, so what makes an item hard for both cancels out.

    Args:
        a, b: `(n,)`, the systems' values on the same items in the same order.
        denominators: `(n,)`, common to both, for a difference of ratios of sums; see `interval`.

    Raises:
        ValueError: as `interval`.
    """
    a, weights = _items(a, denominators)
    b, _ = _items(b, denominators)
    if a.shape != b.shape:
        raise ValueError(f"{len(a)} and {len(b)} items: a paired comparison needs the same items in the same order")
    # Resampled items are common, and so are denominators: the difference is the bootstrap of the items' differences.
    kept = ~np.isnan(a - b + weights)
    values, weights = (a - b)[kept], weights[kept]
    low, high, p = _bootstrap(values, weights, samples, confidence, seed)
    total = weights.sum()
    mean = float(values.sum() / total) if total else float("nan")
    return Difference(mean, low, high, p, n=len(values), left_out=len(a) - len(values))


def _items(values, denominators) -> tuple[np.ndarray, np.ndarray]:
    """Checked, as float64; denominators are ones where there are none."""
    values = np.asarray(values, dtype=np.float64)
    weights = np.ones_like(values) if denominators is None else np.asarray(denominators, dtype=np.float64)
    if values.ndim != 1 or values.shape != weights.shape:
        raise ValueError(f"values of shape {values.shape}, denominators {weights.shape}: expected (n,), one per item")
    for name, numbers in (("value", values), ("denominator", weights)):
        if np.isinf(numbers).any():
            raise ValueError(f"item {np.isinf(numbers).argmax()}: its {name} is infinite; nan leaves an item out")
    if (weights < 0).any():
        raise ValueError(f"item {(weights < 0).argmax()}: its denominator is negative")
    return values, weights


def _bootstrap(
    values: np.ndarray, weights: np.ndarray, samples: int, confidence: float, seed: int
) -> tuple[float, float, float]:
    """Low, high and the two-sided p of a difference from 0."""
    if samples < 1 or not 0 < confidence < 1:
        raise ValueError(f"samples {samples}, confidence {confidence}: expected at least 1, and between 0 and 1")
    undefined = float("nan"), float("nan"), float("nan")
    if len(values) < 2:
        return undefined
    tops, bottoms = _resampled_sums(np.stack([values, weights], axis=1), samples, np.random.default_rng(seed)).T
    drawn = tops[bottoms > 0] / bottoms[bottoms > 0]
    if not len(drawn):
        return undefined
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    smaller = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    return float(low), float(high), min(1.0, 2 * (smaller + 1) / (len(drawn) + 1))


def _resampled_sums(items: np.ndarray, samples: int, rng: np.random.Generator) -> np.ndarray:
    """`(n, 2)` -> `(samples, 2)`: sums over n items drawn with replacement."""
    n = len(items)
    # Hits are 0 or 1: how often each distinct item is drawn is multinomial, and there are few of them.
    distinct, counts = np.unique(items, axis=0, return_counts=True)
    if len(distinct) * ITEMS_PER_VALUE <= n:
        return rng.multinomial(n, counts / n, size=samples) @ distinct
    sums = np.empty((samples, 2))
    constant = bool((items[:, 1] == items[0, 1]).all())
    step = max(1, BLOCK // n)
    for start in range(0, samples, step):
        drawn = rng.integers(n, size=(min(step, samples - start), n), dtype=np.int32)
        rows = slice(start, start + len(drawn))
        sums[rows, 0] = items[:, 0][drawn].sum(1)
        sums[rows, 1] = n * items[0, 1] if constant else items[:, 1][drawn].sum(1)
    return sums
