"""Sites: the places of a model that hold interchangeable units.

A site is a producer (the layer that computes the units), the unit-wise path behind it and an activation
function. A backend discovers them; a producer that is no site is listed as declined, with its reason in plain
words, so that nothing is left out silently.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from neuronsurgery.errors import SiteError, near_names
from neuronsurgery.tables import counted, grouped, render
from neuronsurgery.values import Value


@dataclass(frozen=True)
class Site(Value):
    """A place that holds `num_units` interchangeable units.

    >>> print(Site("fc1", scope="", producer="Linear", activation_fn="relu", num_units=64))
    Site
    | site | scope | producer | activation_fn | units | frozen rows |
    |------|-------|----------|---------------|-------|-------------|
    | fc1  |       | Linear   | relu          |    64 |           0 |
    """

    name: str
    """The qualified name of the producer, as `named_modules()` or `named_parameters()` gives it."""
    scope: str
    """The qualified name of the module whose forward holds both; "" is the model itself."""
    producer: str
    """What computes the units: `"Linear"`, `"Conv2d"`, `"linear"` (the function on a parameter) ..."""
    activation_fn: str
    """The name of the activation function: `"relu"`, `"PReLU"` ..."""
    num_units: int
    """How many units the site holds; for a convolution, its output channels."""
    num_frozen: int = 0
    """How many live frozen rows the site's bank holds now."""
    num_removable: int = 0
    """How many of these contribute nothing any more, and go before the bound on growth declines the site."""

    def __str__(self) -> str:
        return render("Site", COLUMNS, [_row(self)])


@dataclass(frozen=True)
class Sites(Value, Mapping[str, Site]):
    """The sites of a model by name, and what is no site with the reason.

    >>> fc1 = Site("fc1", scope="", producer="Linear", activation_fn="relu", num_units=64)
    >>> sites = Sites({"fc1": fc1}, declined={"head": "no activation function behind it"})
    >>> sites["fc1"].num_units
    64
    >>> print(sites)
    1 site, 64 units
    | site | scope | producer | activation_fn | units | frozen rows |
    |------|-------|----------|---------------|-------|-------------|
    | fc1  |       | Linear   | relu          |    64 |           0 |
    declined: head: no activation function behind it
    >>> Sites.from_json(sites.to_json()) == sites
    True
    """

    sites: Mapping[str, Site]
    """Site name -> site, in the order of the model's modules."""
    declined: Mapping[str, str] = field(default_factory=dict)
    """Name of a producer that is no site -> why."""

    def subset(self, names: Iterable[str]) -> Sites:
        """Returns these sites restricted to `names`, in the order of the model.

        Raises `SiteError` for a name that is no site: with the reason if it was declined, else near names.

        >>> fc1 = Site("fc1", scope="", producer="Linear", activation_fn="relu", num_units=64)
        >>> Sites({"fc1": fc1}).subset(["fc2"])
        Traceback (most recent call last):
        neuronsurgery.errors.SiteError: no site is named 'fc2': did you mean 'fc1'?
        """
        wanted = {names} if isinstance(names, str) else set(names)
        for name in sorted(wanted):
            self.require(name)
        return Sites({name: site for name, site in self.items() if name in wanted}, self.declined)

    def require(self, name: str) -> Site:
        """Returns the site of that name, or raises the `SiteError` that says why there is none."""
        if name in self.sites:
            return self.sites[name]
        if name in self.declined:
            raise SiteError(f"{name!r} is no site, it was declined: {self.declined[name]}")
        raise SiteError(f"no site is named {name!r}: {near_names(name, self.sites)}")

    def __getitem__(self, name: str) -> Site:
        return self.sites[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __str__(self) -> str:
        num_units = sum(site.num_units for site in self.sites.values())
        title = f"{counted(len(self), 'site')}, {counted(num_units, 'unit')}"
        return render(title, COLUMNS, map(_row, self.sites.values()), grouped("declined", self.declined))


COLUMNS = ("site", "scope", "producer", "activation_fn", "units", "frozen rows")


def _row(site: Site) -> tuple[str, str, str, str, int, int]:
    return (site.name, site.scope, site.producer, site.activation_fn, site.num_units, site.num_frozen)
