"""What a criterion is, and how criteria combine with `&`, `|` and `~`.

A criterion scores the units of a site from evidence and marks the chosen ones in a mask. A combination masks
by each of its leaves and combines the masks; `~` marks the units left out. A site takes part only where every
leaf that measures could score it, so `~Stagnant()` never selects a layer of which nothing is known.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from neuronsurgery.errors import CriterionError, FormatError, near_names
from neuronsurgery.evidence import Array, Quantity, relative
from neuronsurgery.sites import Site, Sites
from neuronsurgery.values import Value

Mask = tuple[bool, ...]
"""Which units of a site are chosen, of shape (num_units,)."""

CRITERIA: dict[str, type[Criterion]] = {}
"""Name -> class of every criterion; a class enters it by being defined with a `name`."""


class Scored(Protocol):
    """What a criterion sees of the scores."""

    @property
    def sites(self) -> Sites:
        """All sites, scored or not."""

    @property
    def values(self) -> Mapping[str, Mapping[str, tuple[float, ...]]]:
        """Scored site -> name of a score -> one number per unit."""


@dataclass(frozen=True)
class Criterion(Value, ABC):
    """A rule that chooses units."""

    kind: ClassVar[str] = "Criterion"
    name: ClassVar[str]
    """The name in lower case: in JSON, and for the criteria of the papers in `knife(model, name)`."""

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls):
            CRITERIA[cls.name] = cls

    @property
    def needs(self) -> frozenset[Quantity]:
        """What must have been measured; nothing for a criterion that is independent of evidence."""
        return frozenset()

    @property
    def uses_cooldown(self) -> bool:
        """Whether units younger than the cooldown are passed over."""
        return True

    def leaves(self, available: frozenset[Quantity] = frozenset()) -> tuple[Criterion, ...]:
        """Returns the criteria that score, given what was measured; a combination returns its parts'."""
        return (self,)

    def check(self, sites: Sites) -> None:
        """Raises `SiteError` when the criterion names a site or a unit that does not exist."""
        for leaf in self.leaves():
            if leaf is not self:
                leaf.check(sites)

    def numbers(self, site: Site, measured: Mapping[Quantity, Array], seed: int) -> dict[str, list[float]]:
        """Returns the leaf's scores of one site by name, if it has any."""
        return {}

    @abstractmethod
    def masks(self, scores: Scored) -> Mapping[str, Mask]:
        """Returns which units are chosen, for every scored site."""

    def __and__(self, other: Criterion) -> Criterion:
        return And(self, other) if isinstance(other, Criterion) else NotImplemented

    def __or__(self, other: Criterion) -> Criterion:
        return Or(self, other) if isinstance(other, Criterion) else NotImplemented

    def __invert__(self) -> Criterion:
        return Not(self)

    def __str__(self) -> str:
        return repr(self)

    def to_data(self) -> dict[str, Any]:
        return {"criterion": self.name, **super().to_data()}

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Criterion:
        """Builds the criterion whose name the data holds, whatever class this is called on."""
        name = data.get("criterion")
        if name not in CRITERIA:
            raise FormatError(f"no criterion is named {name!r}: {near_names(str(name), CRITERIA)}")
        fields = {key: item for key, item in data.items() if key != "criterion"}
        # Past this override, to the one that fills the fields of a class.
        return super(Criterion, CRITERIA[name]).from_data(fields)


@dataclass(frozen=True)
class Measuring(Criterion):
    """A criterion that scores each unit by one measured quantity, relative to the layer's mean."""

    @property
    @abstractmethod
    def quantity(self) -> Quantity:
        """What is measured."""

    @abstractmethod
    def choose(self, scores: Sequence[float]) -> Mask:
        """Returns which units of a site are chosen, given their scores, of shape (num_units,)."""

    @property
    def needs(self) -> frozenset[Quantity]:
        return frozenset({self.quantity})

    @property
    def score_name(self) -> str:
        """The name its scores go by; criteria that differ in their threshold only share it."""
        return self.name

    def score(self, measured: Mapping[Quantity, Array]) -> Array:
        """Returns the scores, (num_units,) with mean 1, in the library of the measured arrays."""
        return relative(measured[self.quantity])

    def numbers(self, site: Site, measured: Mapping[Quantity, Array], seed: int) -> dict[str, list[float]]:
        return {self.score_name: self.score(measured).tolist()}

    def masks(self, scores: Scored) -> Mapping[str, Mask]:
        return {name: self.choose(values[self.score_name]) for name, values in scores.values.items()}


@dataclass(frozen=True)
class _Pair(Criterion):
    left: Criterion
    right: Criterion

    symbol: ClassVar[str]
    rule: ClassVar[Callable[[bool, bool], bool]]

    @property
    def needs(self) -> frozenset[Quantity]:
        return self.left.needs | self.right.needs

    @property
    def uses_cooldown(self) -> bool:
        return self.left.uses_cooldown or self.right.uses_cooldown

    def leaves(self, available: frozenset[Quantity] = frozenset()) -> tuple[Criterion, ...]:
        return self.left.leaves(available) + self.right.leaves(available)

    def masks(self, scores: Scored) -> Mapping[str, Mask]:
        left, right = self.left.masks(scores), self.right.masks(scores)
        return {name: tuple(map(type(self).rule, left[name], right[name])) for name in scores.values}

    def __str__(self) -> str:
        return f"{_operand(self.left)} {self.symbol} {_operand(self.right)}"


@dataclass(frozen=True)
class And(_Pair):
    """Chooses the units that both criteria choose: `Stagnant() & Dormant()`."""

    name: ClassVar[str] = "and"
    symbol: ClassVar[str] = "&"
    rule: ClassVar[Callable[[bool, bool], bool]] = bool.__and__


@dataclass(frozen=True)
class Or(_Pair):
    """Chooses the units that at least one of the criteria chooses: `Stagnant() | Dormant()`."""

    name: ClassVar[str] = "or"
    symbol: ClassVar[str] = "|"
    rule: ClassVar[Callable[[bool, bool], bool]] = bool.__or__


@dataclass(frozen=True)
class Not(Criterion):
    """Chooses, in every scored site, the units that the criterion leaves out: `~Stagnant()`."""

    name: ClassVar[str] = "not"
    operand: Criterion

    @property
    def needs(self) -> frozenset[Quantity]:
        return self.operand.needs

    @property
    def uses_cooldown(self) -> bool:
        return self.operand.uses_cooldown

    def leaves(self, available: frozenset[Quantity] = frozenset()) -> tuple[Criterion, ...]:
        return self.operand.leaves(available)

    def masks(self, scores: Scored) -> Mapping[str, Mask]:
        chosen = self.operand.masks(scores)
        return {name: tuple(not one for one in mask) for name, mask in chosen.items()}

    def __str__(self) -> str:
        return f"~{_operand(self.operand)}"


def require_range(what: str, value: float, *, above: float | None = None, reason: str) -> None:
    """Raises `CriterionError` unless value is a number in [0, 1], or in (above, 1] where `above` is given."""
    low = "0 <= " if above is None else f"{above} < "
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_number and (value >= 0 if above is None else value > above) and value <= 1):
        field = what.partition(".")[2]
        raise CriterionError(f"{what} is {value!r}; it must satisfy {low}{field} <= 1: {reason}")


def _operand(criterion: Criterion) -> str:
    return f"({criterion})" if isinstance(criterion, _Pair) else str(criterion)
