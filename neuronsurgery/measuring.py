"""The criteria that measure: a quantity of each unit, relative to the mean over its layer.

`Stagnant` (arXiv 2606.25335), `Dormant` (Sokar et al. 2023) and `GraMa` (Liu et al. 2025) have scores of mean
1, so a threshold is a fraction of an average unit. `Lowest` takes a fraction of each layer by one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor
from typing import ClassVar, Literal

from neuronsurgery.combining import CRITERIA, Criterion, Mask, Measuring, require_range
from neuronsurgery.errors import CriterionError, near_names
from neuronsurgery.evidence import ACTIVITIES, Quantity

MEAN_IS_ONE = "the scores of a layer have mean 1, so a threshold is a fraction of an average unit"
PART_OF_SITE = "it is a fraction of a site's units"


@dataclass(frozen=True)
class Stagnant(Measuring):
    """Chooses units whose relative update activity is below the threshold (strictly).

    The score is `UA_i = |grad w_i| / (|w_i| + eps)` relative to the layer's mean. With `average="scores"`
    each step is normalized before the steps are averaged, so that every step counts the same; with
    `average="ua"` the averages of UA are normalized, as published.

    With `bias=True` the unit's bias in the producer is one more entry of w_i; published scores leave it out. Behind an
    input that hardly varies, weights may lie near zero while the bias does the work: without it these units score
    high. Where a producer has no bias the scores are the same either way; a norm's shift is none.

    Source: arXiv 2606.25335 (KNIFE), as implemented publicly, from where the threshold and eps come.
    Raises `CriterionError` unless 0 < threshold <= 1.

    >>> Stagnant().choose([0.1, 0.25, 2.65])
    (True, False, False)
    """

    name: ClassVar[str] = "stagnant"
    threshold: float = 0.25
    average: Literal["scores", "ua"] = "scores"
    bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range("Stagnant.threshold", self.threshold, above=0, reason=MEAN_IS_ONE)
        if self.average not in ("scores", "ua"):
            raise CriterionError(
                f"Stagnant.average is {self.average!r}; it must be 'scores' (each step normalized, then "
                "averaged) or 'ua' (averaged, then normalized)"
            )
        if not isinstance(self.bias, bool):
            raise CriterionError(
                f"Stagnant.bias is {self.bias!r}; it must be True (norms of rows with their biases) or False (without)"
            )

    @property
    def quantity(self) -> Quantity:
        activity = Quantity.UPDATE_ACTIVITY_WITH_BIAS if self.bias else Quantity.UPDATE_ACTIVITY
        return ACTIVITIES[activity] if self.average == "scores" else activity

    @property
    def score_name(self) -> str:
        average = "" if self.average == "scores" else f"_{self.average}"
        return f"{self.name}{average}{'_bias' if self.bias else ''}"

    def choose(self, scores: Sequence[float]) -> Mask:
        return tuple(score < self.threshold for score in scores)

    def __repr__(self) -> str:
        # Without the bias it is what was printed, and saved in states of schedules, before there was the option.
        bias = ", bias=True" if self.bias else ""
        return f"Stagnant(threshold={self.threshold!r}, average={self.average!r}{bias})"


@dataclass(frozen=True)
class Dormant(Measuring):
    """Chooses units whose mean absolute activation is at most the threshold.

    The score is `E|h_i|` after the activation function, relative to the layer's mean.

    Source: Sokar et al. 2023 (ReDo); the default threshold is that of its common PyTorch port.
    Raises `CriterionError` unless 0 <= threshold <= 1.

    >>> Dormant().choose([0.0, 0.025, 2.975])
    (True, True, False)
    """

    name: ClassVar[str] = "dormant"
    threshold: float = 0.025

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range("Dormant.threshold", self.threshold, reason=MEAN_IS_ONE)

    @property
    def quantity(self) -> Quantity:
        return Quantity.ACTIVATION

    def choose(self, scores: Sequence[float]) -> Mask:
        return tuple(score <= self.threshold for score in scores)


@dataclass(frozen=True)
class GraMa(Measuring):
    """Chooses units whose mean absolute activation gradient is at most the threshold.

    The score is `E|dL/dh_i|`, relative to the layer's mean.

    Source: Liu et al. 2025, eq. 2.
    Raises `CriterionError` unless 0 <= threshold <= 1.

    >>> GraMa().choose([0.01, 1.99])
    (True, False)
    """

    name: ClassVar[str] = "grama"
    threshold: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range("GraMa.threshold", self.threshold, reason=MEAN_IS_ONE)

    @property
    def quantity(self) -> Quantity:
        return Quantity.ACTIVATION_GRADIENT

    def choose(self, scores: Sequence[float]) -> Mask:
        return tuple(score <= self.threshold for score in scores)


REBORN = Dormant(0.1)
"""The units that ReBorn gives a share of others' work, by the threshold of its published code (Qin et al. 2024)."""

NAMED: dict[str, type[Measuring]] = {one.name: one for one in (Stagnant, Dormant, GraMa)}
"""The criteria that `knife(model, name)` accepts by name."""


@dataclass(frozen=True)
class Lowest(Measuring):
    """Chooses the `floor(fraction * num_units)` units of lowest score of each site; ties by unit index.

    `of` says which score: a name or one of `Stagnant`, `Dormant`, `GraMa`, whose threshold plays no role.
    Raises `CriterionError` unless 0 < fraction <= 1.

    >>> Lowest(0.5, of="dormant").choose([1.2, 0.4, 0.4, 2.0])
    (False, True, True, False)
    """

    name: ClassVar[str] = "lowest"
    fraction: float
    of: Criterion | str = "stagnant"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range("Lowest.fraction", self.fraction, above=0, reason=PART_OF_SITE)
        if isinstance(self.of, str):
            object.__setattr__(self, "of", by_name(self.of))
        if not isinstance(self.of, tuple(NAMED.values())):
            raise CriterionError(f"Lowest.of is {self.of}; it must be one of {', '.join(map(repr, NAMED))}")

    @property
    def quantity(self) -> Quantity:
        return self._measure.quantity

    @property
    def score_name(self) -> str:
        return self._measure.score_name

    def choose(self, scores: Sequence[float]) -> Mask:
        return lowest(scores, self.fraction)

    @property
    def _measure(self) -> Measuring:
        assert isinstance(self.of, Measuring)  # the constructor refuses anything else
        return self.of


def by_name(name: str) -> Measuring:
    """Returns the criterion of that name, or raises the `CriterionError` that offers the nearest names."""
    if name in NAMED:
        return NAMED[name]()
    if name in CRITERIA:
        raise CriterionError(
            f"{name!r} needs arguments: pass an object such as {CRITERIA[name].__name__}(...); "
            f"by name: {', '.join(map(repr, NAMED))}"
        )
    raise CriterionError(f"no criterion is named {name!r}: {near_names(name, NAMED)}")


def lowest(scores: Sequence[float], fraction: float) -> Mask:
    """Returns the mask of the `floor(fraction * len(scores))` lowest scores; ties go to the lower index."""
    # The tolerance keeps 0.29 * 100 = 28.999999999999996 at 29.
    count = floor(fraction * len(scores) + 1e-9)
    chosen = set(sorted(range(len(scores)), key=lambda unit: (scores[unit], unit))[:count])
    return tuple(unit in chosen for unit in range(len(scores)))
