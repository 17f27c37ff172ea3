"""Selection: the units chosen, with the scores that chose them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import floor

from neuronsurgery.combining import Mask
from neuronsurgery.errors import CriterionError
from neuronsurgery.scores import Scores
from neuronsurgery.tables import counted, grouped, render
from neuronsurgery.values import Value

COOLDOWN = 100
"""How many optimizer steps a fresh unit is passed over; until then its scores may still be those before."""


@dataclass(frozen=True)
class Selection(Value):
    """The units chosen of each site, and how many young ones were passed over."""

    scores: Scores
    units: Mapping[str, tuple[int, ...]]
    """Site name -> chosen units in ascending order; a site of which none is chosen is absent."""
    passed_over: Mapping[str, int]
    """Site name -> how many units were chosen by the criterion but are younger than the cooldown."""

    @property
    def num_units(self) -> int:
        """How many units are chosen in all sites."""
        return sum(map(len, self.units.values()))

    def __str__(self) -> str:
        title = f"{counted(self.num_units, 'unit')} selected by {self.scores.criterion}"
        columns = (
            "site",
            "units",
            "chosen",
            "share",
            "young passed over",
            "min score",
            "mean score of chosen",
        )
        return render(title, columns, map(self._row, self.scores), grouped("unscored", self.scores.unscored))

    def _row(self, site: str) -> tuple[str, int, int, str, int, float | None, float | None]:
        num_units = self.scores.sites[site].num_units
        chosen = self.units.get(site, ())
        numbers = self.scores.first(site)
        lowest = None if numbers is None else min(numbers)
        mean = None if numbers is None or not chosen else sum(numbers[unit] for unit in chosen) / len(chosen)
        young = self.passed_over.get(site, 0)
        return (site, num_units, len(chosen), f"{len(chosen) / num_units:.1%}", young, lowest, mean)


def select(
    scores: Scores, *, ages: Mapping[str, Mapping[int, int]] | None = None, cooldown: int = COOLDOWN
) -> Selection:
    """Returns the units that the scores' criterion chooses, without those younger than the cooldown.

    `ages` holds, by site, the optimizer steps since a unit's last operation; a unit that it does not list is
    old enough. A combination with a criterion that uses the cooldown uses it.

    Raises `SiteError` when the criterion names a site or unit that does not exist, `CriterionError` for a
    negative cooldown.

    >>> from neuronsurgery.choosing import Units
    >>> from neuronsurgery.scores import score
    >>> from neuronsurgery.sites import Site, Sites
    >>> sites = Sites({"fc1": Site("fc1", "", "Linear", "relu", num_units=4)})
    >>> selection = select(score(sites, None, Units({"fc1": [3, 0]})))
    >>> selection.units
    {'fc1': (0, 3)}
    >>> Selection.from_json(selection.to_json()) == selection
    True
    """
    if cooldown < 0:
        raise CriterionError(f"cooldown is {cooldown}; it is a number of optimizer steps and must be >= 0")
    criterion = scores.criterion
    criterion.check(scores.sites)
    masks = criterion.masks(scores)
    young = _young(ages or {}, cooldown) if criterion.uses_cooldown else {}
    units = {site: _chosen(mask, young.get(site, frozenset())) for site, mask in masks.items()}
    passed_over = {site: sum(mask) - len(units[site]) for site, mask in masks.items()}
    return Selection(
        scores,
        {site: chosen for site, chosen in units.items() if chosen},
        {site: count for site, count in passed_over.items() if count},
    )


def capped(selection: Selection, *, max_units: int | None = None, max_share: float | None = None) -> Selection:
    """Returns the selection with at most so many units in all, and at most that share of the units of each site.

    Those of lowest score stay (by the criterion's first leaf; by index without scores).

    >>> from neuronsurgery.choosing import Units
    >>> from neuronsurgery.scores import score
    >>> from neuronsurgery.sites import Site, Sites
    >>> sites = Sites({"fc1": Site("fc1", "", "Linear", "relu", num_units=4)})
    >>> capped(select(score(sites, None, Units({"fc1": [3, 0, 1]}))), max_share=0.5).units
    {'fc1': (0, 1)}
    """
    units: dict[str, tuple[int, ...]] = dict(selection.units)
    if max_share is not None:
        # The tolerance keeps 0.29 * 100 = 28.999999999999996 at 29.
        room = {site: floor(max_share * selection.scores.sites[site].num_units + 1e-9) for site in units}
        units = {site: tuple(sorted(_by_score(selection, site)[: room[site]])) for site in units}
    if max_units is not None:
        left = [(rank, site, unit) for site in units for rank, unit in _ranked(selection, site, units[site])]
        kept = sorted(left, key=lambda one: one[0])[:max_units]
        units = {site: tuple(sorted(unit for _, where, unit in kept if where == site)) for site in units}
    return replace(selection, units={site: chosen for site, chosen in units.items() if chosen})


def _by_score(selection: Selection, site: str) -> list[int]:
    return [unit for _, unit in sorted(_ranked(selection, site, selection.units[site]))]


def _ranked(selection: Selection, site: str, units: tuple[int, ...]) -> list[tuple[float, int]]:
    numbers = selection.scores.first(site)
    return [(0.0 if numbers is None else numbers[unit], unit) for unit in units]


def _young(ages: Mapping[str, Mapping[int, int]], cooldown: int) -> dict[str, frozenset[int]]:
    return {site: frozenset(unit for unit, age in of_site.items() if age < cooldown) for site, of_site in ages.items()}


def _chosen(mask: Mask, young: frozenset[int]) -> tuple[int, ...]:
    return tuple(unit for unit, is_chosen in enumerate(mask) if is_chosen and unit not in young)
