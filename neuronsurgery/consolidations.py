"""The record of a consolidation: which frozen rows went, why, and by how much that moved anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from neuronsurgery.tables import counted, render
from neuronsurgery.values import Value

__all__ = ["Consolidated", "Consolidation"]


@dataclass(frozen=True)
class Consolidated(Value):
    """What went from one site's bank, in frozen rows."""

    retired: int
    """Rows that had faded to zero."""
    cancelled: int
    """Rows in pairs of equal weights and opposite signs."""
    merged: int
    """Rows in pairs of opposite signs that gave nearly the same on the batches: near-duplicate, dead or constant."""
    left: int
    """Rows that the bank still holds; at 0 there is no bank any more."""
    error: float
    """By how much the site's activations moved: the exact part on random inputs, relative to the largest; or, on the
    batches, root mean squares relative to each other, an upper bound of merged rows, with what distilling adds."""
    distilled: int = 0
    """Rows whose part the rows that are left have taken over as nearly as they can, down to `max_rows`."""

    @property
    def num_rows(self) -> int:
        """How many rows went."""
        return self.retired + self.cancelled + self.merged + self.distilled


@dataclass(frozen=True)
class Consolidation(Value):
    """What `consolidate` did to a model and to the networks that follow it.

    >>> report = Consolidation({"fc1": Consolidated(4, 2, 0, left=0, error=0.0)}, ({"fc1": 0.01},), 120, 90, None, ())
    >>> print(report)
    Consolidated 1 site: 6 frozen rows removed
    | site | retired | cancelled | merged | distilled | rows left | activations moved |
    |------|---------|-----------|--------|-----------|-----------|-------------------|
    | fc1  |       4 |         2 |      0 |         0 |         0 |                 0 |
    numbers: 120 before, 90 after
    mirror 0: activations moved by up to 0.01
    >>> report.num_rows, Consolidation.from_json(report.to_json()) == report
    (6, True)
    """

    sites: Mapping[str, Consolidated]
    """Site name -> what went; sites of which nothing went are left out."""
    mirrors: tuple[Mapping[str, float], ...]
    """For each mirror, site name -> by how much of their largest value its activations moved, on random inputs."""
    parameters_before: int
    """The numbers that the model held: its parameters and its live frozen rows."""
    parameters_after: int
    """The same afterwards."""
    model_error: float | None
    """By how much of its largest value the model's output moved on the batches; None without any."""
    notes: tuple[str, ...] = ()
    """What a reader should know."""

    @property
    def num_rows(self) -> int:
        """How many frozen rows went from the model."""
        return sum(site.num_rows for site in self.sites.values())

    @property
    def max_error(self) -> float:
        """The largest of the sites' errors and the model's; 0 when nothing was measured."""
        return max([*(site.error for site in self.sites.values()), self.model_error or 0.0], default=0.0)

    def __str__(self) -> str:
        title = f"Consolidated {counted(len(self.sites), 'site')}: {counted(self.num_rows, 'frozen row')} removed"
        columns = ("site", "retired", "cancelled", "merged", "distilled", "rows left", "activations moved")
        rows = [
            (name, s.retired, s.cancelled, s.merged, s.distilled, s.left, s.error) for name, s in self.sites.items()
        ]
        return render(title, columns, rows, self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"numbers: {self.parameters_before} before, {self.parameters_after} after"
        if self.model_error is not None:
            yield f"output on the batches: moved by {self.model_error:.3g} of its largest value"
        for place, moved in enumerate(self.mirrors):
            yield f"mirror {place}: activations moved by up to {max(moved.values(), default=0.0):.3g}"
        yield from self.notes
