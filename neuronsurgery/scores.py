"""Scores: a criterion's number for every unit, and why a site has none.

`score` is the only stage that reads evidence. What it returns is on the host and complete: a selection
follows from it alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import isfinite

from neuronsurgery.combining import Criterion
from neuronsurgery.errors import CriterionError, EvidenceError
from neuronsurgery.evidence import Array, Evidence, Quantity
from neuronsurgery.sites import Site, Sites
from neuronsurgery.tables import grouped, render
from neuronsurgery.values import Value

SOURCES = {
    Quantity.UPDATE_ACTIVITY: "gradients",
    Quantity.RELATIVE_UPDATE_ACTIVITY: "gradients",
    Quantity.UPDATE_ACTIVITY_WITH_BIAS: "gradients with biases",
    Quantity.RELATIVE_UPDATE_ACTIVITY_WITH_BIAS: "gradients with biases",
    Quantity.ACTIVATION: "activations",
    Quantity.ACTIVATION_GRADIENT: "activation gradients",
}
"""What the user knows each quantity as."""


@dataclass(frozen=True)
class Scores(Value):
    """The scores of the units of each site: `scores["fc1"]["stagnant"]` has one float per unit, of mean 1."""

    sites: Sites
    criterion: Criterion
    values: Mapping[str, Mapping[str, tuple[float, ...]]]
    """Site name -> name of a score -> one number per unit."""
    unscored: Mapping[str, str]
    """Site name -> why it has no scores; no criterion selects from it."""

    def first(self, site: str) -> tuple[float, ...] | None:
        """Returns the site's scores by the criterion's first leaf that has any."""
        return next(iter(self.values.get(site, {}).values()), None)

    def __getitem__(self, site: str) -> Mapping[str, tuple[float, ...]]:
        return self.values[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def __len__(self) -> int:
        return len(self.values)

    def __str__(self) -> str:
        rows = [
            (site, name, len(one), min(one), sum(one) / len(one), max(one))
            for site, scores in self.values.items()
            for name, one in scores.items()
        ]
        columns = ("site", "score", "units", "min", "mean", "max")
        return render(f"Scores for {self.criterion}", columns, rows, grouped("unscored", self.unscored))


def score(sites: Sites, evidence: Evidence | None, criterion: Criterion, *, seed: int = 0) -> Scores:
    """Returns the score of every unit of `sites`; `seed` is for random criteria without one of their own.

    A site whose layer mean is zero or not finite, or that received no gradient while others did, is listed as
    unscored. Raises `EvidenceError` when what the criterion needs was not measured at all, or was measured on
    another model.

    >>> import numpy as np
    >>> from neuronsurgery.measuring import Stagnant
    >>> sites = Sites({"fc1": Site("fc1", "", "Linear", "relu", num_units=2)})
    >>> evidence = Evidence(sites)
    >>> evidence.record_step({"fc1": (np.array([1.0, 1.0]), np.array([1.0, 9.0]))})
    >>> scores = score(sites, evidence, Stagnant())
    >>> [round(one, 6) for one in scores["fc1"]["stagnant"]]
    [0.2, 1.8]
    >>> Scores.from_json(scores.to_json()) == scores
    True
    """
    measured = _measured(sites, evidence)
    _require_quantities(criterion, measured)
    # The union: a site that lacks what others have is unscored, not scored by less.
    leaves = criterion.leaves(frozenset(quantity for one in measured.values() for quantity in one))
    values: dict[str, Mapping[str, tuple[float, ...]]] = {}
    unscored: dict[str, str] = {}
    for name, site in sites.items():
        numbers, reason = _score_site(site, measured[name], leaves, seed)
        if reason is None:
            values[name] = numbers
        else:
            unscored[name] = reason
    return Scores(sites, criterion, values, unscored)


def over(scores: Scores, site: str, bound: float, name: str = "dormant") -> tuple[int, ...]:
    """Returns the units of a site whose score of that name is above a bound.

    Raises `CriterionError` where the criterion gave no such scores.

    >>> from neuronsurgery.measuring import Dormant
    >>> over(Scores(Sites({}), Dormant(), {"fc1": {"dormant": (0.0, 3.5, 1.0)}}, {}), "fc1", 3.0)
    (1,)
    """
    if name not in scores.values.get(site, {}):
        raise CriterionError(
            f"over-active units are told by the scores that {name!r} gives, and {scores.criterion} has none of "
            f"{site!r}: choose by Dormant(...), alone or in a combination"
        )
    return tuple(unit for unit, one in enumerate(scores[site][name]) if one > bound)


def _measured(sites: Sites, evidence: Evidence | None) -> dict[str, Mapping[Quantity, Array]]:
    if evidence is None:
        return {name: {} for name in sites}
    for name, site in sites.items():
        known = evidence.sites.get(name)
        if known is None or known.num_units != site.num_units:
            found = "no such site" if known is None else f"{known.num_units} units"
            raise EvidenceError(
                f"evidence of another model: site {name!r} has {site.num_units} units here; the evidence has "
                f"{found}: measure this model with surgery.observe or surgery.probe (sites= for range-bearing ones)"
            )
    return {name: evidence.measured(name) for name in sites}


def _require_quantities(criterion: Criterion, measured: Mapping[str, Mapping[Quantity, Array]]) -> None:
    for leaf in criterion.leaves():
        missing = leaf.needs - {quantity for one in measured.values() for quantity in one}
        if missing and measured:
            raise EvidenceError(_what_is_missing(leaf, missing, measured))


def _what_is_missing(
    leaf: Criterion, missing: frozenset[Quantity], measured: Mapping[str, Mapping[Quantity, Array]]
) -> str:
    names = list(measured)
    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
    found = sorted({SOURCES[quantity] for one in measured.values() for quantity in one})
    what = " and ".join(sorted({SOURCES[quantity] for quantity in missing}))
    backward = "call loss.backward() first, or " if what.startswith("gradients") else ""
    return (
        f"criterion {leaf.name!r} needs the {what} of site {names[0]!r}{others}; "
        f"found {'only ' + ' and '.join(found) if found else 'none'}: {backward}measure with "
        "surgery.observe(model) or surgery.probe(model, batches, loss_fn) and pass evidence="
    )


def _score_site(
    site: Site, measured: Mapping[Quantity, Array], leaves: Iterable[Criterion], seed: int
) -> tuple[Mapping[str, tuple[float, ...]], str | None]:
    """Returns the site's scores and the reason why they are of no use, if there is one."""
    numbers: dict[str, tuple[float, ...]] = {}
    for leaf in leaves:
        if leaf.needs - set(measured):
            return {}, _why_unmeasured(leaf.needs)
        scored = leaf.numbers(site, measured, seed)
        reason = _why_useless(leaf.needs, scored)
        if reason is not None:
            return {}, reason
        numbers.update({name: tuple(one) for name, one in scored.items()})
    return numbers, None


def _why_unmeasured(needs: frozenset[Quantity]) -> str:
    if needs == {Quantity.ACTIVATION}:
        return "its activations were not recorded"
    return "received no gradient"


def _why_useless(needs: frozenset[Quantity], scored: Mapping[str, list[float]]) -> str | None:
    for quantity in needs:
        for one in scored.values():
            if not all(map(isfinite, one)):
                return f"{SOURCES[quantity]} are not finite"
            if not any(one):
                return f"{SOURCES[quantity]} are all zero"
    return None
