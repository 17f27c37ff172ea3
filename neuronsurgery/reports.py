"""Reports: the record of an operation, to print, to keep and to undo by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from neuronsurgery.methods import METHODS
from neuronsurgery.plans import ROWS_PER_OPERATION, Plan
from neuronsurgery.tables import counted, grouped, render
from neuronsurgery.values import Value

WITH_BANKS = ("knife", "fade_to_fresh")
"""The methods that leave frozen rows."""


@dataclass(frozen=True)
class Report(Value):
    """What an operation did, and how closely the outputs agree.

    >>> from neuronsurgery.sites import Site, Sites
    >>> sites = Sites({"fc1": Site("fc1", "", "Linear", "relu", num_units=4)})
    >>> made = Plan({"fc1": (0, 3)}, {}, "Units(units={'fc1': (0, 3)})", 4.0, (), sites)
    >>> report = Report(
    ...     operation=1, operated={"fc1": (0, 3)}, declined={}, errors={"fc1": 1e-8}, plan=made,
    ...     parameters_before=58, parameters_after=94, notes=(), verified=False, model_error=None,
    ... )
    >>> print(report)
    Operation 1: 2 units operated on, chosen by Units(units={'fc1': (0, 3)})
    | site | activation_fn | units operated / units | frozen rows after | relative error |
    |------|---------------|------------------------|-------------------|----------------|
    | fc1  | relu          | 2 / 4                  |                 4 |          1e-08 |
    parameters: 58 before, 94 after
    trace: unverified (pass verify=batch to compare the whole model)
    >>> report.num_units, report.max_error
    (2, 1e-08)
    >>> Report.from_json(report.to_json()) == report
    True
    """

    operation: int
    """The id of the operation, counted per model."""
    operated: Mapping[str, tuple[int, ...]]
    """Site name -> units operated on."""
    declined: Mapping[str, str]
    """Name -> why nothing of it was operated on."""
    errors: Mapping[str, float]
    """Site name -> relative error of the site's output, measured on random inputs to its producer."""
    plan: Plan
    """The plan that was carried out."""
    parameters_before: int
    """The numbers that the model held before the operation: its parameters and its live frozen rows."""
    parameters_after: int
    """The same afterwards: the parameters as before, and the rows that the operation froze."""
    notes: tuple[str, ...]
    """What a reader should know."""
    verified: bool
    """Whether the whole model was compared on a batch."""
    model_error: float | None
    """Relative error of the whole model's output on that batch: by how much it moved, where a method moves it."""
    method: str = "knife"
    """The name of the method, as in `methods.METHODS`."""

    @property
    def num_units(self) -> int:
        """How many units were operated on."""
        return sum(map(len, self.operated.values()))

    @property
    def keeps_banks(self) -> bool:
        """Whether the method leaves frozen rows, and so an operation that can be undone."""
        return self.method in WITH_BANKS

    @property
    def max_error(self) -> float:
        """The largest relative error measured, over the sites and the whole model; 0 when nothing was."""
        return max(*self.errors.values(), self.model_error or 0.0, 0.0)

    def __str__(self) -> str:
        units = counted(self.num_units, "unit")
        label = f"Operation {self.operation}" if self.keeps_banks else self.method
        label += f" ({self.method})" if self.keeps_banks and self.method != "knife" else ""
        title = f"{label}: {units} operated on, chosen by {self.plan.criterion}"
        columns = ("site", "activation_fn", "units operated / units", "frozen rows after", "relative error")
        return render(title, columns, map(self._row, self.operated), self._lines())

    def _row(self, name: str) -> tuple[str, str, str, int, float | None]:
        site, num_operated = self.plan.sites[name], len(self.operated[name])
        after = site.num_frozen + (ROWS_PER_OPERATION * num_operated if self.keeps_banks else 0)
        operated = f"{num_operated} / {site.num_units}"
        return (name, site.activation_fn, operated, after, self.errors.get(name))

    def _lines(self) -> Iterator[str]:
        yield f"parameters: {self.parameters_before} before, {self.parameters_after} after"
        error = "" if self.model_error is None else f" {self.model_error:.3g}"
        if self.verified and METHODS[self.method].preserves == "yes":
            yield f"trace: verified on a batch{error and f', relative error{error}'}"
        elif self.verified:
            yield f"output on a batch: moved by{error} of its largest value"
        elif METHODS[self.method].preserves != "no":
            yield "trace: unverified (pass verify=batch to compare the whole model)"
        yield from self.notes
        yield from grouped("declined", self.declined)
