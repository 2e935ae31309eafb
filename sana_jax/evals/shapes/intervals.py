"""95 % intervals of scores, and of the difference of two runs on the same noise."""

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
    """The `Interval` of the mean of independent proportions from their own (Zou and Donner, "MOVER",
    Statistics in Medicine 27, 2008): distances to the limits add in quadrature."""
    scores, lows, highs = (np.array(column) for column in zip(*parts))
    score, below, above = scores.mean(), scores - lows, highs - scores
    return Interval(
        float(score),
        float(score - np.linalg.norm(below) / len(scores)),
        float(score + np.linalg.norm(above) / len(scores)),
    )


def paired_difference(first, second, tags, rounds=10000, seed=0):
    """The `Interval` of score(first) - score(second), the same pictures' noise in both.

    A bootstrap of pairs within each category: what the noise decides is common to both runs and cancels.

    Args:
      first, second: [n] bool or numbers, one for each picture, in the same order.
      tags: [n] category of each.
    """
    rng = np.random.default_rng(seed)
    change = np.asarray(first, float) - np.asarray(second, float)
    tags = np.asarray(tags)
    total, score = np.zeros(rounds), 0.0
    names = sorted(set(tags.tolist()))
    for name in names:
        values = change[tags == name]
        kinds, counts = np.unique(values, return_counts=True)
        drawn = rng.multinomial(len(values), counts / len(values), size=rounds)
        total += drawn @ kinds / len(values) / len(names)
        score += values.mean() / len(names)
    low, high = np.percentile(total, [2.5, 97.5])
    return Interval(float(score), float(low), float(high))
