"""Verdicts: whether a claim holds, by paired differences to doing nothing and to resetting the optimizer alone.

A claim about a method is confirmed when it is better than both, so that neither the passing of time nor a fresh
optimizer explains it. That tasks are solved is one claim, that units can learn again another. Where many seeds make the
smallest difference certain, a measure says how large one has to be to count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

from marl.reproduce.statistics import Difference, Scores, holm, paired_difference

__all__ = ["LEVEL", "Judgement", "Verdict", "judge"]

LEVEL = 0.05
"""P-values below it count."""


class Verdict(str, Enum):
    """What the runs say of a claim."""

    CONFIRMED = "confirmed"
    """Better than both controls by more than what counts, whole intervals and adjusted p-value."""
    CONTRADICTED = "contradicted"
    """Worse than one of them, by as much."""
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
    """Of being better than both by more than what counts, adjusted for the number of methods."""
    verdict: Verdict
    """What follows."""


def judge(
    scores: Mapping[str, Scores],
    methods: Iterable[str],
    *,
    controls: tuple[str, str],
    is_less_better: bool = False,
    smallest_effect: float = 0.0,
) -> dict[str, Judgement]:
    """Judge methods by scores (num_seeds,) of the same seeds in the same order.

    `controls` are the arm without intervention and that of an optimizer reset alone. Differences have to be larger than
    `smallest_effect` to count.

    >>> import numpy as np
    >>> luck = np.random.default_rng(0).normal(size=30)
    >>> scores = {"none": luck, "optimizer": luck + 0.1, "ours": luck + 0.5, "theirs": luck - 0.5}
    >>> found = judge(scores, ["ours", "theirs"], controls=("none", "optimizer"))
    >>> [found[name].verdict.value for name in ("ours", "theirs")]
    ['confirmed', 'contradicted']
    """
    sign = -1.0 if is_less_better else 1.0

    def pairs_beyond(margin: float) -> dict[str, Pair]:
        """How much better each is than the controls, less the margin."""
        first, second = (sign * scores[control] + margin for control in controls)
        own = {method: sign * scores[method] for method in methods}
        return {
            method: (paired_difference(each, first), paired_difference(each, second)) for method, each in own.items()
        }

    methods = tuple(methods)
    plain, above, below = (pairs_beyond(margin) for margin in (0.0, smallest_effect, -smallest_effect))
    # Better than both is as likely by chance as better than the one that it beats less clearly; and so with worse.
    better = holm({method: max(map(_p_of_better, pair)) for method, pair in above.items()})
    worse = holm({method: min(1.0, 2 * _p_of_worse(pair)) for method, pair in below.items()})
    verdicts = {each: _verdict(above[each], below[each], better[each], worse[each]) for each in methods}
    return {each: Judgement(*plain[each], better[each], verdicts[each]) for each in methods}


Pair = tuple[Difference, Difference]


def _verdict(above: Pair, below: Pair, better: float, worse: float) -> Verdict:
    if all(each.is_above_zero for each in above) and better < LEVEL:
        return Verdict.CONFIRMED
    if any(each.is_below_zero for each in below) and worse < LEVEL:
        return Verdict.CONTRADICTED
    return Verdict.OPEN


def _p_of_better(found: Difference) -> float:
    """Of being above zero: what lies below has none that speaks for it."""
    return found.p_value if found.value > 0 else 1.0


def _p_of_worse(pair: Pair) -> float:
    """Of the clearer of two differences, if any, that are below zero; one of two is twice as likely by chance."""
    return min((each.p_value for each in pair if each.value < 0), default=1.0)
