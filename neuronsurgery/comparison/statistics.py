"""Means and interquartile means over seeds, with stratified bootstrap intervals (Agarwal et al. 2021).

As `rliable` has them: seeds are drawn anew within each benchmark, the statistic is computed of each draw, and 2.5 % of
the draws lie on either side of the interval.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["LEVELS", "NUM_DRAWS", "Estimate", "Scores", "estimate", "interquartile_mean", "mean"]

Scores = NDArray[np.float64]
"""(num_seeds, num_columns); columns are benchmarks, or what else seeds have nothing in common in."""

NUM_DRAWS = 2000
LEVELS = [2.5, 97.5]


@dataclass(frozen=True)
class Estimate:
    """A statistic with its 95 % interval.

    >>> print(Estimate(0.5, 0.4, 0.6))
    0.50 (0.40 to 0.60)
    """

    value: float
    """Of all scores."""
    low: float
    """Lower end."""
    high: float
    """Upper end."""

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def mean(scores: Scores) -> Scores:
    """The mean over seeds and columns, (..., num_seeds, num_columns) to (...)."""
    found: Scores = scores.mean(axis=(-2, -1))
    return found


def interquartile_mean(scores: Scores) -> Scores:
    """The mean of the middle half of all scores, (..., num_seeds, num_columns) to (...).

    The lowest and the highest quarter, rounded down, are left out.

    >>> float(interquartile_mean(np.array([[0.0], [1.0], [2.0], [9.0]])))
    1.5
    """
    ordered = np.sort(scores.reshape(*scores.shape[:-2], -1), axis=-1)
    size = ordered.shape[-1]
    found: Scores = ordered[..., size // 4 : size - size // 4].mean(axis=-1)
    return found


def estimate(scores: Scores, statistic: Callable[[Scores], Scores] = mean, *, num_draws: int = NUM_DRAWS) -> Estimate:
    """A statistic of scores with a percentile interval; seeds are drawn anew within each column (stratified bootstrap).

    >>> print(estimate(np.full((3, 2), 0.5)))
    0.50 (0.50 to 0.50)
    """
    scores = _columns(scores)
    generator, (num_seeds, num_columns) = np.random.default_rng(0), scores.shape
    drawn = generator.integers(num_seeds, size=(num_draws, num_seeds, num_columns))
    low, high = np.percentile(statistic(scores[drawn, np.arange(num_columns)]), LEVELS)
    return Estimate(float(statistic(scores)), float(low), float(high))


def _columns(scores: Scores) -> Scores:
    return scores[:, None] if scores.ndim == 1 else scores
