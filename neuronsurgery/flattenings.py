"""The record of a flattening: which sites became plain layers, how much wider they are, and which kept their bank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from neuronsurgery.tables import counted, grouped, listed, render
from neuronsurgery.values import Value

__all__ = ["Flattened", "Flattening"]


@dataclass(frozen=True)
class Flattened(Value):
    """What became of one site that lost its bank."""

    units_before: int
    """The layer's units, composite units among them."""
    units_after: int
    """The same and, as units of their own, the frozen rows that contributed anything."""
    dropped: int
    """Frozen rows that went because they contributed nothing: retired, or equal with opposite signs."""
    consumers: tuple[str, ...]
    """The layers that read the site: they got columns for the new units."""
    error: float
    """By how much of their largest value the site's activations moved, on random inputs to its producer."""


@dataclass(frozen=True)
class Flattening(Value):
    """What `flatten` made of a model.

    >>> report = Flattening({"fc1": Flattened(8, 12, 2, ("fc2",), 1e-8)}, {"fc2": "it is returned"}, 90, 90, None)
    >>> print(report)
    Flattened 1 site: 4 frozen rows are units now
    | site | units before | after | rows dropped | consumers | activations moved |
    |------|--------------|-------|--------------|-----------|-------------------|
    | fc1  |            8 |    12 |            2 | fc2       |             1e-08 |
    numbers: 90 before, 90 after
    trace: unverified (pass verify=batch to compare the whole model)
    keeps its bank: fc2: it is returned
    >>> report.num_rows, Flattening.from_json(report.to_json()) == report
    (4, True)
    """

    sites: Mapping[str, Flattened]
    """Site name -> what became of it."""
    declined: Mapping[str, str]
    """Site name -> why it keeps its bank."""
    parameters_before: int
    """The numbers that the model held: its parameters and its live frozen rows."""
    parameters_after: int
    """The same afterwards: the frozen rows are parameters, and their units have outgoing weights."""
    model_error: float | None
    """By how much of its largest value the model's output moved on the batch; None without one."""
    notes: tuple[str, ...] = ()
    """What a reader should know."""

    @property
    def num_rows(self) -> int:
        """How many frozen rows became units."""
        return sum(site.units_after - site.units_before for site in self.sites.values())

    @property
    def max_error(self) -> float:
        """The largest of the sites' errors and the model's; 0 when nothing was measured."""
        return max([*(site.error for site in self.sites.values()), self.model_error or 0.0], default=0.0)

    def __str__(self) -> str:
        verb = "is a unit" if self.num_rows == 1 else "are units"
        title = f"Flattened {counted(len(self.sites), 'site')}: {counted(self.num_rows, 'frozen row')} {verb} now"
        columns = ("site", "units before", "after", "rows dropped", "consumers", "activations moved")
        rows = [
            (name, s.units_before, s.units_after, s.dropped, listed(s.consumers), s.error)
            for name, s in self.sites.items()
        ]
        return render(title, columns, rows, self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"numbers: {self.parameters_before} before, {self.parameters_after} after"
        if self.model_error is None:
            yield "trace: unverified (pass verify=batch to compare the whole model)"
        else:
            yield f"trace: verified on a batch, relative error {self.model_error:.3g}"
        yield from self.notes
        yield from grouped("keeps its bank", self.declined)
