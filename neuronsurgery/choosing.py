"""The criteria that measure nothing: at random, by hand, by a function."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from operator import index
from random import Random as Generator
from typing import Any, ClassVar

import numpy as np

from neuronsurgery.combining import Criterion, Mask, Scored, require_range
from neuronsurgery.errors import CriterionError, SiteError
from neuronsurgery.evidence import Array, Quantity
from neuronsurgery.measuring import NAMED, PART_OF_SITE, lowest
from neuronsurgery.sites import Site, Sites


@dataclass(frozen=True)
class Random(Criterion):
    """Chooses `floor(fraction * num_units)` units of each site at random: the control for a criterion.

    The draws are scores too (uniform in [0, 1), the lowest are chosen), so that a selection follows from its
    scores. Without a `seed` of its own it takes that of `score`; the order of the sites plays no role.
    Raises `CriterionError` unless 0 < fraction <= 1.

    >>> site = Site("fc1", "", "Linear", "relu", num_units=4)
    >>> Random(0.5, seed=1).numbers(site, {}, seed=0) == Random(0.9, seed=1).numbers(site, {}, seed=7)
    True
    """

    name: ClassVar[str] = "random"
    fraction: float
    seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range("Random.fraction", self.fraction, above=0, reason=PART_OF_SITE)

    @property
    def score_name(self) -> str:
        """The name its draws go by; two seeds in one combination are two draws."""
        return self.name if self.seed is None else f"{self.name}_{self.seed}"

    def numbers(self, site: Site, measured: Mapping[Quantity, Array], seed: int) -> dict[str, list[float]]:
        generator = Generator(f"{seed if self.seed is None else self.seed}:{site.name}")
        return {self.score_name: [generator.random() for _ in range(site.num_units)]}

    def masks(self, scores: Scored) -> Mapping[str, Mask]:
        return {name: lowest(values[self.score_name], self.fraction) for name, values in scores.values.items()}


@dataclass(frozen=True)
class Units(Criterion):
    """Chooses units by hand, as site name -> unit indices; needs no evidence and no cooldown.

    Raises `CriterionError` for indices that are no integers. Sites and units that the model does not have
    raise `SiteError` when they are selected.

    >>> Units({"fc1": [0, 3]})
    Units(units={'fc1': (0, 3)})
    """

    name: ClassVar[str] = "units"
    units: Mapping[str, Iterable[int]]

    def __post_init__(self) -> None:
        if not isinstance(self.units, Mapping):
            raise CriterionError(
                f"Units takes site name -> unit indices, such as {{'fc1': [0, 3]}}; found {self.units!r}"
            )
        object.__setattr__(self, "units", {name: _indices(name, units) for name, units in self.units.items()})
        super().__post_init__()

    @property
    def uses_cooldown(self) -> bool:
        return False

    def check(self, sites: Sites) -> None:
        for name, units in self.units.items():
            num_units = sites.require(name).num_units
            outside = [unit for unit in units if not 0 <= unit < num_units]
            if outside:
                raise SiteError(
                    f"Units asks for unit {outside[0]} of site {name!r}, which has {num_units} units: "
                    f"choose from 0 to {num_units - 1}"
                )
            twice = [unit for unit, count in Counter(units).items() if count > 1]
            if twice:
                raise SiteError(f"Units asks for unit {twice[0]} of site {name!r} more than once: name it once")

    def masks(self, scores: Scored) -> Mapping[str, Mask]:
        chosen = {name: set(self.units.get(name, ())) for name in scores.values}
        return {
            name: tuple(unit in units for unit in range(scores.sites[name].num_units)) for name, units in chosen.items()
        }


@dataclass(frozen=True)
class Selected(Criterion):
    """Chooses what another criterion chose before, and prints as that one; it needs no evidence and no cooldown.

    A schedule selects within its bounds and hands the units to a method with this.

    >>> print(Selected("Stagnant(threshold=0.25)", {"fc1": [0]}, {"fc1": {"stagnant": [0.1, 1.9]}}))
    Stagnant(threshold=0.25)
    """

    name: ClassVar[str] = "selected"
    by: str
    """The criterion that chose the units, as it prints."""
    units: Mapping[str, tuple[int, ...]]
    values: Mapping[str, Mapping[str, tuple[float, ...]]]
    """Site name -> name of a score -> the scores that chose them, one number per unit."""

    @property
    def uses_cooldown(self) -> bool:
        return False

    def numbers(self, site: Site, measured: Mapping[Quantity, Array], seed: int) -> dict[str, list[float]]:
        return {name: list(one) for name, one in self.values.get(site.name, {}).items()}

    def check(self, sites: Sites) -> None:
        Units(self.units).check(sites)

    def masks(self, scores: Scored) -> Mapping[str, Mask]:
        return Units(self.units).masks(scores)

    def __str__(self) -> str:
        return self.by


@dataclass(frozen=True)
class Custom(Criterion):
    """Chooses units by a function of the `Scores` that returns site name -> mask (one bool per unit).

    The scores hold "stagnant", "dormant" and "grama" as far as the evidence goes; a site that the function
    leaves out has no unit chosen. It has no JSON form.

    >>> Custom(lambda scores: {"fc1": [score < 0.1 for score in scores["fc1"]["grama"]]}).uses_cooldown
    True
    """

    name: ClassVar[str] = "custom"
    function: Callable[[Any], Mapping[str, Any]]

    def leaves(self, available: frozenset[Quantity] = frozenset()) -> tuple[Criterion, ...]:
        return (*(one() for one in NAMED.values() if one().needs <= available), self)

    def check(self, sites: Sites) -> None:
        """A function names its sites only when it is called."""

    def masks(self, scores: Scored) -> Mapping[str, Mask]:
        result = self.function(scores)
        if not isinstance(result, Mapping):
            raise CriterionError(f"{self} must return site name -> mask; it returned {type(result).__name__}")
        masks = {name: self._mask(scores.sites.require(name), mask) for name, mask in result.items()}
        none = {name: (False,) * scores.sites[name].num_units for name in scores.values}
        return {name: masks.get(name, none[name]) for name in scores.values}

    def to_data(self) -> dict[str, Any]:
        raise CriterionError(f"{self} has no JSON form, because it holds a function: save the plan instead")

    def __str__(self) -> str:
        return f"Custom({name_of(self.function)})"

    def _mask(self, site: Site, mask: Any) -> Mask:
        found = np.asarray(mask)
        if found.dtype != bool or found.shape != (site.num_units,):
            raise CriterionError(
                f"{self} must return a mask of {site.num_units} bools for site {site.name!r}; "
                f"it returned {found.dtype} of shape {found.shape}"
            )
        return tuple(found.tolist())


def name_of(thing: object) -> str:
    """Returns the name of a function or class, or that of the class of anything else."""
    return str(getattr(thing, "__name__", type(thing).__name__))


def _indices(name: str, units: Iterable[Any]) -> tuple[int, ...]:
    try:
        return tuple(index(unit) for unit in units)
    except TypeError as error:
        raise CriterionError(f"the units of site {name!r} must be integers; found {units!r}") from error
