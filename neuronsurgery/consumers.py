"""Consumers: which layers read the units of each site, and why that is not known of others.

A unit's outgoing weights are columns of its consumers. Methods that write them (see `methods`) operate only on sites of
which all consumers are known; `knife` needs none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from neuronsurgery.errors import SiteError
from neuronsurgery.tables import counted, grouped, listed, render
from neuronsurgery.values import Value

__all__ = ["Consumers"]


@dataclass(frozen=True)
class Consumers(Value):
    """The consumers of each site, and the sites whose outgoing weights are not known or not their own.

    >>> print(Consumers({"fc1": {"fc2": 1, "head": 4}}, {"fc3": "it is returned by Net"}))
    Consumers of 1 site
    | site | consumers | columns of a unit |
    |------|-----------|-------------------|
    | fc1  | fc2, head | 1, 4              |
    declined: fc3: it is returned by Net
    """

    readers: Mapping[str, Mapping[str, int]]
    """Site name -> name of a consumer -> how many of its columns belong to each unit."""
    declined: Mapping[str, str]
    """Site name -> why its outgoing weights cannot be written."""

    def require(self, names: Iterable[str]) -> None:
        """Raise the `SiteError` that says why a site's outgoing weights cannot be written, if one's cannot."""
        for name in names:
            if name in self.declined:
                raise SiteError(
                    f"the outgoing weights of site {name!r} cannot be written: {self.declined[name]}. A method that "
                    "needs no consumers, such as knife, can operate there"
                )

    def __str__(self) -> str:
        rows = [(site, listed(list(of_site)), listed(list(of_site.values()))) for site, of_site in self.readers.items()]
        title = f"Consumers of {counted(len(self.readers), 'site')}"
        return render(title, ("site", "consumers", "columns of a unit"), rows, grouped("declined", self.declined))
