"""The young rows of a parameter: those that surgery overwrote so lately that their updates differ from the others'.

They are numbered, read and written as the units' axes have it, and ordered by what they need: as few kernels and as
little waiting for the device as can be, since what corrects them runs at every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neuronsurgery.pytorch.unit_axes import UnitAxes

__all__ = ["Young"]


@dataclass
class Young:
    """The young rows of one parameter, on its device; `weights` and `step` are as they were before the step.

    `rows`: (r,) int64, ascending, units under `axes`; `index`: the same as `axes.index` has it; `births`: (r,) float,
    NaN for a row to be forgotten, none after `latest`; `host_births`: the same as numbers of the host, just one where
    all rows have the same; `shape`: (r,), or what `axes.unit_shape` says where these are all rows of the parameter
    (`is_all`), so that they are seen in place; `weights`: (*shape, *row_shape); `step`: 0-d when on the device;
    `gradient` and `state`: (r, *row_shape) of each, where the family replays steps. `checked_at`: the count of steps at
    which it was last looked whether rows have grown up.
    """

    rows: Tensor
    axes: UnitAxes
    index: tuple[Tensor, ...]
    births: Tensor
    latest: float
    host_births: float | NDArray[np.float64]
    is_all: bool
    shape: tuple[int, ...]
    weights: Tensor | None = None
    step: float | Tensor | None = None
    gradient: Tensor | None = None
    state: dict[str, Tensor] | None = None
    checked_at: float = 0.0

    @staticmethod
    def of(parameter: Tensor, rows: Tensor, births: Tensor, latest: float, axes: UnitAxes) -> Young:
        """Those that are young, born after 0 and not forgotten; it waits for the device."""
        is_young = births > 0
        rows, order = rows[is_young].sort()
        births = births[is_young][order]
        on_host = births.cpu().numpy().astype(np.float64)
        is_common = len(on_host) > 0 and bool((on_host == on_host[0]).all())
        host_births = float(on_host[0]) if is_common else on_host
        is_all = len(rows) == axes.num_units(parameter.shape)
        shape = axes.unit_shape(parameter.shape) if is_all else (len(rows),)
        return Young(rows, axes, axes.index(parameter.shape, rows), births, latest, host_births, is_all, shape)

    def staying(self, parameter: Tensor, stays: Tensor, latest: float) -> Young:
        """Those of the rows for which `stays`, (r,) bool, says so."""
        return Young.of(parameter, self.rows[stays], self.births[stays], latest, self.axes)

    def cohorts(self) -> Iterator[tuple[float, Tensor]]:
        """The births, earliest first, each with the places of its rows in `rows`, int64 on the device."""
        on_host = np.broadcast_to(self.host_births, len(self.rows))
        for born in np.unique(on_host):
            yield float(born), torch.from_numpy(np.flatnonzero(on_host == born)).to(self.rows.device)

    def forget_step(self) -> None:
        """Let go of what was kept from before a step."""
        self.weights = self.step = self.gradient = self.state = None

    def select(self, tensor: Tensor) -> Tensor:
        """The rows of a tensor of the parameter's shape, (*shape, *row_shape), to be read only and under `no_grad`."""
        view = self.axes.view(tensor)
        if self.is_all:
            return view
        return view.index_select(0, self.rows) if len(self.index) == 1 else view[self.index]

    def write(self, tensor: Tensor, values: Tensor) -> None:
        """Overwrite the rows of such a tensor."""
        view = self.axes.view(tensor)
        if self.is_all:
            view.copy_(values)
        elif len(self.index) == 1:
            view.index_copy_(0, self.rows, values.to(tensor))
        else:
            view.index_put_(self.index, values.to(tensor))

    def over(self, column: Tensor, like: Tensor) -> Tensor:
        """Shape one value per row, (r,), to apply to all of `like`, (*shape, ...)."""
        return column.view(*self.shape, *[1] * (like.dim() - len(self.shape)))
