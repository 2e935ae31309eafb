"""95 % intervals of scores, of averages, and of the difference of two runs on the same noise."""

from typing import NamedTuple

import numpy as np

Z = 1.959963984540054  # 97.5 % of a standard normal


class Interval(NamedTuple):
    score: float
    low: float
    high: float

    def __str__(self):
        return f"{self.score:.2f} [{self.low:.2f}, {self.high:.2f}]"


def wilson(correct, images):
    """The `Interval` of a proportion by Wilson's score (Journal of the ASA 22, 1927): honest at 0 and 1."""
    share, z2 = correct / images, Z**2 / images
    centre = (share + z2 / 2) / (1 + z2)
    half = Z * np.sqrt(share * (1 - share) / images + z2 / (4 * images)) / (1 + z2)
    return Interval(share, float(max(centre - half, 0)), float(min(centre + half, 1)))


def mean(parts):
    """The `Interval` of the mean of what was measured independently, from their own (Zou and Donner, "MOVER",
    Statistics in Medicine 27, 2008): distances to the limits add in quadrature."""
    scores, lows, highs = (np.array(column) for column in zip(*parts))
    score, below, above = scores.mean(), scores - lows, highs - scores
    return Interval(
        float(score),
        float(score - np.linalg.norm(below) / len(scores)),
        float(score + np.linalg.norm(above) / len(scores)),
    )


def average(values):
    """The `Interval` of the average of [n] numbers, n >= 2, as n of a normal distribution's."""
    values = np.asarray(values, np.float64)
    score, half = values.mean(), Z * values.std(ddof=1) / np.sqrt(len(values))
    return Interval(float(score), float(score - half), float(score + half))


def paired(first, second):
    """The `Interval` of the difference of two proportions of the same [n] pictures, bool each.

    From Wilson's limits of both and their correlation (Newcombe, Statistics in Medicine 17, 1998,
    2635-2650, method 10): never of width 0, however few pairs differ.
    """
    first, second = np.asarray(first, bool), np.asarray(second, bool)
    n = len(first)
    both, neither = int(np.sum(first & second)), int(np.sum(~first & ~second))
    one, other = wilson(int(first.sum()), n), wilson(int(second.sum()), n)
    excess = both * neither - int(np.sum(first & ~second)) * int(np.sum(~first & second))
    if excess > 0:  # less the continuity correction
        excess = max(excess - n / 2, 0)
    spread = n**2 * np.sqrt(one.score * (1 - one.score) * other.score * (1 - other.score))
    phi = excess / spread if spread else 0.0

    def apart(a, b):
        return np.sqrt(max(a**2 - 2 * phi * a * b + b**2, 0))

    score = one.score - other.score
    low = score - apart(one.score - one.low, other.high - other.score)
    return Interval(score, float(low), float(score + apart(one.high - one.score, other.score - other.low)))


def paired_difference(first, second, tags):
    """The `Interval` of score(first) - score(second), the same pictures' noise in both.

    What the noise decides is common to both runs and cancels, within each category.

    Args:
      first, second: [n] bool, one for each picture, in the same order.
      tags: [n] category of each.
    """
    first, second, tags = np.asarray(first, bool), np.asarray(second, bool), np.asarray(tags)
    return mean([paired(first[tags == tag], second[tags == tag]) for tag in sorted(set(tags.tolist()))])
