"""Plans: what will be operated on, validated and bounded before anything changes.

Every operation on a unit adds two frozen rows, its old weights and the compensation of the fresh ones.
`max_growth` bounds the live frozen rows of a site as a multiple of its width; what has no room stays out and
is named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import floor, isfinite

from neuronsurgery.errors import PlanError
from neuronsurgery.selection import Selection
from neuronsurgery.sites import Sites
from neuronsurgery.tables import counted, grouped, listed, render
from neuronsurgery.values import Value

ROWS_PER_OPERATION = 2
MAX_GROWTH = 4.0


@dataclass(frozen=True)
class Plan(Value):
    """The units to operate on, by site, and everything that is left alone with its reason."""

    units: Mapping[str, tuple[int, ...]]
    """Site name -> units to operate on, in ascending order; never an empty tuple."""
    declined: Mapping[str, str]
    """Name -> why nothing of it is operated on: producers that are no site, unscored and full sites."""
    criterion: str
    """The criterion that chose the units, as it prints."""
    max_growth: float
    """The bound on a site's live frozen rows, as a multiple of its units."""
    notes: tuple[str, ...]
    """What a reader should know: units that stay out, young units passed over."""
    sites: Sites
    """The sites as they were when the plan was made."""

    @property
    def num_units(self) -> int:
        """How many units the plan operates on."""
        return sum(map(len, self.units.values()))

    def __str__(self) -> str:
        rows = [self._row(site, units) for site, units in self.units.items()]
        title = f"Plan: operate on {counted(self.num_units, 'unit')} chosen by {self.criterion}"
        columns = ("site", "activation_fn", "operate on", "units", "frozen rows", "after", "at most")
        return render(title, columns, rows, [*self.notes, *grouped("declined", self.declined)])

    def _row(self, name: str, units: tuple[int, ...]) -> tuple[str, str, str, int, int, int, int]:
        site = self.sites[name]
        after = site.num_frozen + ROWS_PER_OPERATION * len(units)
        most = floor(self.max_growth * site.num_units)
        return (name, site.activation_fn, listed(units), site.num_units, site.num_frozen, after, most)


def plan(selection: Selection, *, max_growth: float = MAX_GROWTH) -> Plan:
    """Returns the plan to operate on the selected units, as far as `max_growth` leaves room.

    Where it does not, the units of lowest score come first (by the criterion's first leaf; by index without
    scores). Raises `PlanError` unless max_growth is finite and positive.

    >>> from neuronsurgery.choosing import Units
    >>> from neuronsurgery.scores import score
    >>> from neuronsurgery.selection import select
    >>> from neuronsurgery.sites import Site
    >>> sites = Sites({"fc1": Site("fc1", "", "Linear", "relu", num_units=4)})
    >>> chosen = plan(select(score(sites, None, Units({"fc1": [0, 3]}))), max_growth=0.5)
    >>> print(chosen)
    Plan: operate on 1 unit chosen by Units(units={'fc1': (0, 3)})
    | site | activation_fn | operate on | units | frozen rows | after | at most |
    |------|---------------|------------|-------|-------------|-------|---------|
    | fc1  | relu          | 0          |     4 |           0 |     2 |       2 |
    fc1: 1 of 2 selected units stay out: max_growth=0.5 allows 2 frozen rows, 0 are live
    >>> Plan.from_json(chosen.to_json()) == chosen
    True
    """
    if not (isfinite(max_growth) and max_growth > 0):
        raise PlanError(
            f"max_growth is {max_growth}; it bounds a site's frozen rows as a multiple of its units "
            "and must be finite and > 0"
        )
    units: dict[str, tuple[int, ...]] = {}
    full: dict[str, str] = {}
    notes = [f"{site}: {counted(count, 'young unit')} passed over" for site, count in selection.passed_over.items()]
    for name, chosen in selection.units.items():
        kept = _with_room(selection, name, max_growth)
        reason = _why_out(selection, name, len(chosen) - len(kept), max_growth)
        if kept:
            units[name] = kept
            notes += [f"{name}: {reason}"] if len(kept) < len(chosen) else []
        elif chosen:
            full[name] = f"{reason}; consolidate the site or raise max_growth"
    sites, scores = selection.scores.sites, selection.scores
    declined = {**sites.declined, **scores.unscored, **full}
    return Plan(units, declined, str(scores.criterion), float(max_growth), tuple(notes), sites)


def _with_room(selection: Selection, name: str, max_growth: float) -> tuple[int, ...]:
    site = selection.scores.sites[name]
    room = max(0, floor(max_growth * site.num_units) - site.num_frozen + site.num_removable) // ROWS_PER_OPERATION
    chosen, numbers = selection.units[name], selection.scores.first(name)
    if numbers is None:
        return tuple(sorted(chosen)[:room])
    return tuple(sorted(sorted(chosen, key=lambda unit: (numbers[unit], unit))[:room]))


def _why_out(selection: Selection, name: str, num_out: int, max_growth: float) -> str:
    site = selection.scores.sites[name]
    return (
        f"{num_out} of {len(selection.units[name])} selected units stay out: max_growth={max_growth} allows "
        f"{floor(max_growth * site.num_units)} frozen rows, {site.num_frozen - site.num_removable} are live"
    )
