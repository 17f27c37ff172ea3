"""Means and interquartile means over seeds, with stratified bootstrap intervals (Agarwal et al. 2021).

As `rliable` has them: seeds are drawn anew within each benchmark, the statistic is computed of each draw, and 2.5 % of
the draws lie on either side of the interval.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Estimate", "estimate", "interquartile_mean", "mean"]

Scores = NDArray[np.float64]
"""(num_seeds, num_benchmarks)"""

NUM_DRAWS = 2000


@dataclass(frozen=True)
class Estimate:
    """A statistic with its 95 % interval.

    >>> print(Estimate(0.5, 0.4, 0.6))
    0.50 (0.40 to 0.60)
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def estimate(scores: Scores, statistic: Callable[[Scores], float], num_draws: int = NUM_DRAWS) -> Estimate:
    """A statistic of scores, with a percentile interval by the stratified bootstrap; equal scores, equal intervals.

    >>> print(estimate(np.full((3, 2), 0.5), mean))
    0.50 (0.50 to 0.50)
    """
    generator = np.random.default_rng(0)
    num_seeds, num_benchmarks = scores.shape
    columns = np.arange(num_benchmarks)
    draws = [
        statistic(scores[generator.integers(num_seeds, size=(num_seeds, num_benchmarks)), columns])
        for _ in range(num_draws)
    ]
    low, high = np.percentile(draws, [2.5, 97.5])
    return Estimate(statistic(scores), float(low), float(high))


def mean(scores: Scores) -> float:
    """The mean over all."""
    return float(scores.mean())


def interquartile_mean(scores: Scores) -> float:
    """The mean of the middle half of all scores, without the lowest and the highest quarter, rounded down.

    >>> interquartile_mean(np.array([[0.0], [1.0], [2.0], [9.0]]))
    1.5
    """
    ordered: Any = np.sort(scores, axis=None)
    cut = len(ordered) // 4
    return float(ordered[cut : len(ordered) - cut].mean())
