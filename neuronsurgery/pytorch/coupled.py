"""Optimizers that couple the rows of a parameter, and can be operated with all the same: a row of a table for each.

No row of theirs can be made as if it alone were fresh, as every update depends on all rows. What can be done is to let
nothing of the old unit stay in the state, and to keep the size of the new rows' updates that of a fresh parameter's.
How much the other rows' updates change was measured (`docs/how-to/optimizers.md`); the report says that they do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Adafactor, Muon, Optimizer

from neuronsurgery.pytorch.fresh_state import own_step
from neuronsurgery.pytorch.transaction import Change, WriteRows, revert
from neuronsurgery.pytorch.unit_axes import ROWS, UnitAxes

__all__ = ["Coupled", "coupled_of", "refresh_coupled"]


@dataclass(frozen=True)
class Coupled:
    """What rows of a family's state become, by name, and what a report says of it.

    `"zero"`: no momentum. `"mean"`: what the other rows have on average, for second moments that a shared rate averages
    too slowly to start from zero. An entry that has no row for each unit stays.
    """

    entries: Mapping[str, Literal["zero", "mean"]]
    note: str


def coupled_of(optimizer: Optimizer) -> Coupled | None:
    """Return the row of the class, or of the parent whose `step` it uses."""
    cls = type(optimizer)
    known = next((ancestor for ancestor in cls.__mro__ if ancestor in _COUPLED), None)
    return _COUPLED[known] if known is not None and own_step(cls) is own_step(known) else None


def refresh_coupled(
    optimizer: Optimizer, coupled: Coupled, parameter: nn.Parameter, rows: Tensor, axes: UnitAxes = ROWS
) -> list[Change]:
    """Plan the changes that give rows, units under `axes`, what the family's row says."""
    units = axes.unit_shape(parameter.shape)
    return [
        _Renew(entry, coupled.entries[key], rows, axes)
        for key, entry in optimizer.state[parameter].items()
        if key in coupled.entries and isinstance(entry, Tensor) and axes.unit_shape(entry.shape) == units
    ]


class _Renew:
    """Write zeros, or the mean of the other rows, into rows of a state tensor."""

    def __init__(self, entry: Tensor, to: Literal["zero", "mean"], rows: Tensor, axes: UnitAxes) -> None:
        self.entry, self.to, self.rows, self.axes = entry, to, rows.to(entry.device), axes
        self.writes: list[WriteRows] = []

    def apply(self) -> None:
        every = self.axes.rows(self.entry)
        others = torch.ones(len(every), dtype=torch.bool, device=every.device).index_fill(0, self.rows, False)
        source = every[others] if bool(others.any()) else every
        values = torch.zeros_like(every[0]) if self.to == "zero" else source.mean(dim=0)
        self.writes = [WriteRows(self.entry, self.rows, values.expand(len(self.rows), *values.shape), self.axes)]
        self.writes[0].apply()

    def revert(self) -> None:
        revert(self.writes)


_COUPLED: Mapping[type[Optimizer], Coupled] = {
    Muon: Coupled(
        {"momentum_buffer": "zero"},
        "Muon couples the rows of a parameter: operated rows start without momentum, and the other rows' updates "
        "change with them, most at first",
    ),
    Adafactor: Coupled(
        {"row_var": "mean", "col_var": "mean", "variance": "mean"},
        "Adafactor couples the rows of a parameter: operated rows start with the other rows' mean second moment, and "
        "the size of all updates follows the weights' as a whole",
    ),
}
