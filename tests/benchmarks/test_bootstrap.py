"""The bootstrap against cases worked by hand, and its coverage."""

import math

import numpy as np
import pytest

from benchmarks import bootstrap
from benchmarks.bootstrap import interval, paired

NAN = math.nan


def test_two_items_by_hand():
    # Two draws out of {0, 1}: the mean is 0, 1/2, 1 with probability 1/4, 1/2, 1/4.
    assert interval([0, 1]) == (0, 1)
    assert interval([0, 1], confidence=0.4) == (0.5, 0.5)  # between the quantiles 0.3 and 0.7


def test_a_ratio_by_hand():
    # Items 1/1 and 0/3. Draws: both the first (1/4): 2/2; one each (1/2): 1/4; both the second (1/4): 0/6.
    assert interval([1, 0], [1, 3]) == (0, 1)
    assert interval([1, 0], [1, 3], confidence=0.4) == (0.25, 0.25)
    # A draw of the second item alone has no ratio here; the rest have 1.
    assert interval([1, 0], [1, 0]) == (1, 1)
    assert all(map(math.isnan, interval([1, 0], [0, 0])))


@pytest.mark.parametrize("items_per_value", [1, math.inf])
def test_p_by_hand(monkeypatch, items_per_value):
    monkeypatch.setattr(bootstrap, "ITEMS_PER_VALUE", items_per_value)
    # Differences 1, 1, 1, -1. Four draws are at or below 0 in the mean with at least two of -1:
    # 1 - (3/4)^4 - 4 (1/4) (3/4)^3 = 0.26172; p is twice that. The standard error of 2 x a share of 10,000 is 0.009.
    difference = paired([1, 1, 1, 0], [0, 0, 0, 1])
    assert difference.mean == 0.5 and difference.n == 4 and difference.left_out == 0
    assert difference.p == pytest.approx(0.52344, abs=0.036)
    # The smallest mean, -1, has probability 1/256 and -1/2 has 12/256: the 2.5 % quantile is -1/2. Four of 1: 81/256.
    assert (difference.low, difference.high) == (-0.5, 1.0)
    assert paired([0, 0, 0, 1], [1, 1, 1, 0]).p == pytest.approx(difference.p, abs=0.036)


def test_a_paired_ratio_is_the_difference_of_the_ratios():
    rng = np.random.default_rng(0)
    golds = rng.integers(1, 3, 400).astype(float)
    a, b = rng.binomial(golds.astype(int), 0.7), rng.binomial(golds.astype(int), 0.5)
    difference = paired(a, b, golds)
    assert difference.mean == pytest.approx(a.sum() / golds.sum() - b.sum() / golds.sum())
    assert 0.1 < difference.low < difference.mean < difference.high < 0.3
    assert difference.p == pytest.approx(2 / 10_001)  # no draw is at or below 0


def test_the_same_system_twice():
    values = np.random.default_rng(0).random(50)
    difference = paired(values, values)
    assert (difference.mean, difference.low, difference.high, difference.p) == (0, 0, 0, 1)


def test_pairing_cancels_what_is_hard_for_both():
    rng = np.random.default_rng(0)
    b = rng.random(200)
    difference = paired(b + 0.02 + rng.normal(0, 0.02, 200), b)
    alone = interval(b)
    assert difference.low > 0 and difference.p < 0.001
    assert difference.high - difference.low < (alone[1] - alone[0]) / 5


def test_nan_items_are_left_out_and_counted():
    values, other = np.array([0.0, NAN, 1.0, 1.0]), np.array([1.0, 1.0, NAN, 0.0])
    assert interval(values) == interval([0.0, 1.0, 1.0])
    assert interval(values, [1, 1, NAN, 2]) == interval([0.0, 1.0], [1, 2])
    difference = paired(values, other)
    assert (difference.n, difference.left_out, difference.mean) == (2, 2, 0)
    assert paired([1.0, 0.0], [0.0, 0.0], [1.0, NAN]).left_out == 1


def test_fewer_than_two_items_have_no_interval():
    assert all(map(math.isnan, (*interval([]), *interval([0.3]), *interval([0.3, NAN]))))
    one, none = paired([1.0], [0.25]), paired([NAN], [1.0])
    assert one.mean == 0.75 and one.n == 1 and all(map(math.isnan, (one.low, one.high, one.p)))
    assert none.n == 0 and none.left_out == 1 and all(map(math.isnan, (none.mean, none.low, none.high, none.p)))


def test_the_seed_decides():
    values = np.random.default_rng(3).random(40)
    assert interval(values, seed=1) == interval(values, seed=1) != interval(values, seed=2)
    assert paired(values, values**2, seed=1) == paired(values, values**2, seed=1)


def test_the_intervals_are_scipys():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(8)
    a, b = rng.exponential(size=120), rng.exponential(size=120)
    golds = rng.integers(1, 4, 120).astype(float)

    def scipys(statistic, *samples):
        drawn = stats.bootstrap(
            samples, statistic, paired=True, vectorized=True, method="percentile", n_resamples=10_000,
            rng=np.random.default_rng(9),
        )  # fmt: skip
        return tuple(drawn.confidence_interval)

    # Each end is a quantile of 10,000 draws: it moves by 0.001 to 0.004 (one deviation) from seed to seed.
    ratio = scipys(lambda x, y, axis: x.sum(axis) / y.sum(axis), a, golds)
    difference = paired(a, b)
    assert interval(a) == pytest.approx(scipys(np.mean, a), abs=0.015)
    assert interval(a, golds) == pytest.approx(ratio, abs=0.01)
    assert (difference.low, difference.high) == pytest.approx(scipys(np.mean, a - b), abs=0.02)


@pytest.mark.parametrize("ratio", [False, True])
def test_both_ways_of_drawing_agree(monkeypatch, ratio):
    rng = np.random.default_rng(4)
    golds = rng.integers(1, 4, 200).astype(float) if ratio else None
    hits = rng.integers(0, 2, 200).astype(float)
    by_value = interval(hits, golds)
    monkeypatch.setattr(bootstrap, "ITEMS_PER_VALUE", math.inf)
    monkeypatch.setattr(bootstrap, "BLOCK", 1000)  # many blocks
    # The interval is about 0.14 (0.08) wide; an end of it moves by about a hundredth of that between seeds.
    assert interval(hits, golds) == pytest.approx(by_value, abs=0.006)
    # The usual approximation for a mean of hits or for a ratio, by its residuals.
    golds = np.ones(200) if golds is None else golds
    rate = hits.sum() / golds.sum()
    half = 1.96 * (hits - rate * golds).std() / golds.mean() / math.sqrt(200)
    assert by_value == pytest.approx((rate - half, rate + half), abs=0.01)


@pytest.mark.parametrize("kind", ["mean of hits", "mean of a skewed value", "ratio", "paired"])
def test_a_95_percent_interval_covers_the_truth_95_percent_of_the_time(kind):
    rng = np.random.default_rng(5)
    held = 0
    for seed in range(400):
        if kind == "mean of hits":
            truth, (low, high) = 0.4, interval(rng.random(150) < 0.4, samples=600, seed=seed)
        elif kind == "mean of a skewed value":
            truth, (low, high) = 1.0, interval(rng.exponential(size=150), samples=600, seed=seed)
        elif kind == "ratio":
            golds = rng.integers(1, 3, 150)
            truth, (low, high) = 0.4, interval(rng.binomial(golds, 0.4), golds, samples=600, seed=seed)
        else:
            hard = rng.random(150)
            a, b = rng.random(150) < hard, rng.random(150) < hard / 2
            truth, difference = 0.25, paired(a, b, samples=600, seed=seed)
            low, high = difference.low, difference.high
        held += low <= truth <= high
    # 400 trials at 95 %: 380, standard deviation 4.4; percentile intervals of 150 items hold a little less.
    assert 364 <= held <= 394


def test_under_no_difference_p_is_below_5_percent_5_percent_of_the_time():
    rng = np.random.default_rng(6)
    draws = [rng.random((2, 150)) < rng.random(150) for _ in range(400)]
    below = sum(paired(a, b, samples=600, seed=seed).p < 0.05 for seed, (a, b) in enumerate(draws))
    assert 8 <= below <= 36


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="item 1: its value is infinite"):
        interval([0, math.inf])
    with pytest.raises(ValueError, match="item 0: its denominator is negative"):
        interval([0, 1], [-1, 2])
    with pytest.raises(ValueError, match="same items"):
        paired([0, 1], [0, 1, 1])
    with pytest.raises(ValueError, match="one per item"):
        interval([0, 1], [1])
    with pytest.raises(ValueError, match="confidence 95"):
        interval([0, 1], confidence=95)
    with pytest.raises(ValueError, match="samples 0"):
        paired([0, 1], [0, 0], samples=0)
