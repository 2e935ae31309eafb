"""Intervals against figures worked out elsewhere, and against chance itself."""

import numpy as np
import pytest

from sana_jax.evals.shapes import intervals


@pytest.mark.parametrize(
    "correct, images, low, high",
    [  # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson(correct, images, low, high):
    found = intervals.wilson(correct, images)
    assert found.score == correct / images
    assert found[1:] == pytest.approx((low, high), abs=6e-5)


def test_mean_covers_as_it_says():
    rng, shares = np.random.default_rng(0), np.array([0.99, 0.95, 0.8, 0.97, 0.9, 0.85])
    inside = 0
    for counts in rng.binomial(60, shares, size=(2000, 6)):
        found = intervals.mean([intervals.wilson(int(k), 60) for k in counts])
        inside += found.low <= shares.mean() <= found.high
    assert 0.93 < inside / 2000 < 0.975


def test_pairs_cancel_what_is_common():
    rng = np.random.default_rng(0)
    tags = np.repeat(["a", "b"], 300)
    hard = rng.random(600) < 0.4
    changed = rng.random(600) < 0.02
    found = intervals.paired_difference(~hard | changed, ~hard, tags)
    gain = (hard & changed).mean()
    assert found.score == pytest.approx(gain) and found.low <= gain <= found.high
    assert found.high - found.low < 0.03  # of two runs apart it would be 0.11
    other = intervals.paired_difference(~hard, ~hard | changed, tags)
    assert other.score == pytest.approx(-gain)


@pytest.mark.parametrize("right, lost, gained", [(0.97, 0.004, 0.0), (0.9, 0.02, 0.05), (0.6, 0.3, 0.2)])
def test_difference_covers_as_it_says(right, lost, gained):
    """Also where one pair in 250 differs: the second run loses a share of what is right, and gains of the rest."""
    rng, tags = np.random.default_rng(0), np.repeat(np.arange(6), 60)
    truth, inside = right * lost - (1 - right) * gained, 0
    for _ in range(400):
        first, chance = rng.random(360) < right, rng.random(360)
        found = intervals.paired_difference(first, np.where(first, chance > lost, chance < gained), tags)
        inside += found.low <= truth <= found.high
    assert 0.93 < inside / 400 <= (0.985 if lost > 0.1 else 1)  # cautious where few pairs differ


def test_runs_that_agree_are_not_certain_to():
    few, many = (intervals.paired(*[np.ones(n, bool)] * 2) for n in (60, 600))
    assert few.low < few.score == 0 < few.high and -few.low == pytest.approx(few.high)
    assert few.high == pytest.approx(1 - intervals.wilson(60, 60).low)  # nothing says that they are correlated
    assert many.high < 0.15 * few.high


def test_average():
    found = intervals.average([30.0, 32.0, 34.0])
    assert found == pytest.approx((32, 32 - 1.96 * 2 / 3**0.5, 32 + 1.96 * 2 / 3**0.5), abs=1e-4)


def test_categories_weigh_the_same():
    found = intervals.paired_difference([1, 0, 0, 0, 0], [0, 0, 0, 0, 0], ["a", "b", "b", "b", "b"])
    assert found.score == 0.5
    assert intervals.mean([intervals.wilson(1, 1), intervals.wilson(0, 9)]).score == 0.5
