"""Verdicts: whether a claim holds, by paired differences to doing nothing and to resetting the optimizer alone.

A claim about a method is confirmed when it is better than both, so that neither the passing of time nor a fresh
optimizer explains it. That tasks are solved is one claim, that units can learn again another.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

from marl.reproduce.statistics import Difference, Scores, holm, paired_difference

__all__ = ["Judgement", "Verdict", "judge"]

LEVEL = 0.05


class Verdict(str, Enum):
    """What the runs say of a claim."""

    CONFIRMED = "confirmed"
    """Better than both controls, whole intervals and adjusted p-value."""
    CONTRADICTED = "contradicted"
    """Worse than one of them."""
    OPEN = "open"
    """Neither."""


@dataclass(frozen=True)
class Judgement:
    """A method against the two controls, in one measure; positive differences are in its favor."""

    to_nothing: Difference
    """To no intervention."""
    to_optimizer: Difference
    """To a reset of the optimizer alone."""
    p_value: float
    """Of being better than both, adjusted for the number of methods."""
    verdict: Verdict
    """What follows."""


def judge(
    scores: Mapping[str, Scores], methods: Iterable[str], *, nothing: str, optimizer: str, is_less_better: bool = False
) -> dict[str, Judgement]:
    """Judge methods by scores (num_seeds,) of the same seeds in the same order.

    >>> import numpy as np
    >>> luck = np.random.default_rng(0).normal(size=30)
    >>> scores = {"none": luck, "optimizer": luck + 0.1, "ours": luck + 0.5, "theirs": luck - 0.5}
    >>> found = judge(scores, ["ours", "theirs"], nothing="none", optimizer="optimizer")
    >>> [found[name].verdict.value for name in ("ours", "theirs")]
    ['confirmed', 'contradicted']
    """
    sign = -1.0 if is_less_better else 1.0

    def better_by(method: str, control: str) -> Difference:
        return paired_difference(sign * scores[method], sign * scores[control])

    pairs = {method: (better_by(method, nothing), better_by(method, optimizer)) for method in methods}
    # Better than both is as likely by chance as better than the one that it beats less clearly; and so with worse.
    better = holm({method: max(each.p_value for each in pair) for method, pair in pairs.items()})
    worse = holm({method: min(1.0, 2 * _p_of_worse(pair)) for method, pair in pairs.items()})
    return {
        method: Judgement(*pair, better[method], _verdict(pair, better[method], worse[method]))
        for method, pair in pairs.items()
    }


Pair = tuple[Difference, Difference]


def _verdict(pair: Pair, better: float, worse: float) -> Verdict:
    if all(each.is_above_zero for each in pair) and better < LEVEL:
        return Verdict.CONFIRMED
    if any(each.is_below_zero for each in pair) and worse < LEVEL:
        return Verdict.CONTRADICTED
    return Verdict.OPEN


def _p_of_worse(pair: Pair) -> float:
    """Of the clearer of two differences, if any, that are below zero; one of two is twice as likely by chance."""
    return min((each.p_value for each in pair if each.value < 0), default=1.0)
