"""Statistics over seeds: interquartile means, bootstrap intervals, paired differences, shares, many comparisons.

The unit that is drawn anew is the seed: what is measured of one seed, its tasks, its units, is no independent sample.
As in rliable (Agarwal et al. 2021), which cannot be imported with the newest pandas; a test compares where it can.
Generators are seeded: equal scores give equal intervals.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from marl.errors import SettingsError
from neuronsurgery.comparison.statistics import (
    LEVELS,
    NUM_DRAWS,
    Estimate,
    Scores,
    estimate,
    interquartile_mean,
    mean,
)

__all__ = [
    "Difference",
    "Estimate",
    "Scores",
    "estimate",
    "holm",
    "interquartile_mean",
    "mean",
    "paired_difference",
    "performance_profile",
    "probability_of_improvement",
    "wilson",
]


@dataclass(frozen=True)
class Difference(Estimate):
    """A mean difference between two methods on the same seeds."""

    p_value: float
    """How often as large a difference, of either sign, is to be expected where there is none."""

    @property
    def is_above_zero(self) -> bool:
        """Whether the whole interval is."""
        return self.low > 0

    @property
    def is_below_zero(self) -> bool:
        """Whether the whole interval is."""
        return self.high < 0

    def __str__(self) -> str:
        return f"{self.value:+.2f} ({self.low:+.2f} to {self.high:+.2f})"


def paired_difference(first: Scores, second: Scores, *, num_draws: int = NUM_DRAWS) -> Difference:
    """The mean of first - second, (num_seeds,) each of the same seeds in the same order, which are drawn in pairs.

    The p-value is twice the share of draws on the other side of zero. It is never below that of so many differences of
    one sign by chance, 2^(1 - num_seeds), so that with five seeds or fewer nothing is significant.

    >>> print(paired_difference(np.array([1.0, 2.0, 3.0]), np.array([0.5, 1.5, 2.5])))
    +0.50 (+0.50 to +0.50)
    """
    differences = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    num_seeds = len(differences)
    drawn = np.random.default_rng(0).integers(num_seeds, size=(num_draws, num_seeds))
    means = differences[drawn].mean(axis=1)
    low, high = np.percentile(means, LEVELS)
    above, below = (1 + np.sum(means >= 0)) / (1 + num_draws), (1 + np.sum(means <= 0)) / (1 + num_draws)
    p_value = min(1.0, max(2 * float(min(above, below)), 2.0 ** (1 - num_seeds)))
    return Difference(float(differences.mean()), float(low), float(high), p_value)


def probability_of_improvement(first: Scores, second: Scores, *, num_draws: int = NUM_DRAWS) -> Estimate:
    """How likely a run of the first scores more than one of the second, equal ones counted half; (num_seeds,) each.

    >>> print(probability_of_improvement(np.array([1.0, 2.0]), np.array([0.0, 1.0])))
    0.88 (0.50 to 1.00)
    """
    generator = np.random.default_rng(0)
    wins = np.sign(np.subtract.outer(first, second)) / 2 + 0.5
    rows, columns = (_shares_drawn(generator, size, num_draws) for size in wins.shape)
    low, high = np.percentile(np.sum((rows @ wins) * columns, axis=1), LEVELS)
    return Estimate(float(wins.mean()), float(low), float(high))


def performance_profile(scores: Scores, thresholds: Scores) -> Scores:
    """The share of runs that score more than each threshold, (num_thresholds,).

    >>> performance_profile(np.array([0.0, 0.5, 1.0]), np.array([0.0, 0.5])).round(2).tolist()
    [0.67, 0.33]
    """
    shares: Scores = (np.ravel(scores)[None] > thresholds[:, None]).mean(axis=1)
    return shares


def wilson(num_successes: int, num_trials: int) -> Estimate:
    """A share with the interval of Wilson 1927, which is right near 0 and 1 too.

    >>> print(wilson(30, 30))
    1.00 (0.89 to 1.00)
    """
    if not 0 <= num_successes <= num_trials or num_trials == 0:
        raise SettingsError(f"asked for the share of {num_successes} in {num_trials}: give at least one trial")
    z = 1.959964
    share, weight = num_successes / num_trials, 1 + z**2 / num_trials
    center = (share + z**2 / (2 * num_trials)) / weight
    half = z * math.sqrt(share * (1 - share) / num_trials + z**2 / (4 * num_trials**2)) / weight
    return Estimate(share, max(0.0, center - half), min(1.0, center + half))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """P-values adjusted for how many there are (Holm 1979): below 0.05 in any of them is an error in 5 % of cases.

    >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
    {'a': 0.03, 'c': 0.06, 'b': 0.06}
    """
    adjusted, largest = {}, 0.0
    for place, (name, p_value) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_value))
        adjusted[name] = largest
    return adjusted


def _shares_drawn(generator: np.random.Generator, size: int, num_draws: int) -> Scores:
    """Which share each of so many seeds has in every draw of as many, (num_draws, size)."""
    drawn = generator.integers(size, size=(num_draws, size))
    counts = np.zeros((num_draws, size))
    np.add.at(counts, (np.arange(num_draws)[:, None], drawn), 1 / size)
    return counts
