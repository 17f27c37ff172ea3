"""The record of mirroring: what target networks were given of a model's structure, and by how much they moved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from neuronsurgery.tables import counted, render
from neuronsurgery.values import Value

__all__ = ["MirrorReport", "Mirrored"]


@dataclass(frozen=True)
class Mirrored(Value):
    """What one target was given."""

    made: Mapping[str, tuple[int, ...]]
    """Site name -> units that became composite units, or were given further members."""
    taken_back: Mapping[str, tuple[int, ...]]
    """Site name -> units of which operations were taken back that the model no longer has."""
    moved: Mapping[str, float]
    """Site name -> by how much of their largest value its activations moved, on random inputs to its producer."""
    output_moved: float | None
    """By how much of its largest value the target's output moved on the batch; None without one."""

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites at which something was changed."""
        return tuple(self.moved)


@dataclass(frozen=True)
class MirrorReport(Value):
    """What `mirror` did to each of its targets.

    >>> target = Mirrored(made={"fc1": (0, 3)}, taken_back={}, moved={"fc1": 0.0}, output_moved=None)
    >>> report = MirrorReport("own", (target,), ())
    >>> print(report)
    Mirrored onto 1 target, the frozen rows its own: 2 composite units made, 0 taken back
    | target | site | units made | units taken back | activations moved |
    |--------|------|------------|------------------|-------------------|
    |      0 | fc1  |          2 |                0 |                 0 |
    outputs: unverified (pass verify=batch to compare the whole target)
    >>> report.num_units, MirrorReport.from_json(report.to_json()) == report
    (2, True)
    """

    frozen: str
    """`"own"` or `"shared"`: whose frozen rows the targets hold."""
    targets: tuple[Mirrored, ...]
    """One for each target, in order."""
    notes: tuple[str, ...]
    """What a reader should know."""

    @property
    def num_units(self) -> int:
        """How many units were made composite units, over all targets."""
        return sum(len(units) for target in self.targets for units in target.made.values())

    @property
    def num_taken_back(self) -> int:
        """Of how many units operations were taken back, over all targets."""
        return sum(len(units) for target in self.targets for units in target.taken_back.values())

    @property
    def max_moved(self) -> float:
        """The largest relative move measured, over sites and outputs; 0 when nothing was."""
        found = [moved for target in self.targets for moved in (*target.moved.values(), target.output_moved or 0.0)]
        return max(found, default=0.0)

    def __str__(self) -> str:
        whose = "its own" if self.frozen == "own" else "the model's"
        done = f"{counted(self.num_units, 'composite unit')} made, {self.num_taken_back} taken back"
        title = f"Mirrored onto {counted(len(self.targets), 'target')}, the frozen rows {whose}: {done}"
        columns = ("target", "site", "units made", "units taken back", "activations moved")
        return render(title, columns, self._rows(), self._lines())

    def _rows(self) -> Iterator[tuple[int, str, int, int, float]]:
        for index, target in enumerate(self.targets):
            for site in target.sites:
                counts = (len(units.get(site, ())) for units in (target.made, target.taken_back))
                yield (index, site, *counts, target.moved[site])  # type: ignore[misc]

    def _lines(self) -> Iterator[str]:
        moved = [target.output_moved for target in self.targets if target.output_moved is not None]
        if moved:
            yield f"outputs: moved by {', '.join(f'{each:.3g}' for each in moved)} of their largest value on the batch"
        else:
            yield "outputs: unverified (pass verify=batch to compare the whole target)"
        yield from self.notes
