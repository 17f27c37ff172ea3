"""Where the units are in a parameter: most layers number them by rows, some by columns or by more than one axis.

What belongs to one unit (its **row**: incoming weights, their gradients, their optimizer state) is read and written
through this, so that `nn.Linear` (out, in), `nn.ConvTranspose2d` (in, out / groups, ...), `x @ W` (in, out) and the
stacked weights of experts (experts, in, out) are one case.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ROWS", "UnitAxes"]


@dataclass(frozen=True)
class UnitAxes:
    """The axes of a tensor that number its units, slowest first; units are counted in row-major order over them.

    `groups` above 1 splits axis 0 into (groups, rest) first, as a grouped transposed convolution does; the axes count
    after that. With one group nothing is split: a transposed convolution is `UnitAxes((1,))` then.

    Example:
        >>> weight = torch.arange(6).reshape(2, 3)      # (in, out): three units of two incoming weights each
        >>> columns = UnitAxes((1,))
        >>> columns.num_units(weight.shape), columns.take(weight, torch.tensor([2])).tolist()
        (3, [[2, 5]])
    """

    axes: tuple[int, ...] = (0,)
    groups: int = 1

    def view(self, tensor: Tensor) -> Tensor:
        """A view with the units' axes first: (*unit_axes, *row_shape)."""
        if self.groups > 1:
            tensor = tensor.unflatten(0, (self.groups, -1))  # type: ignore[no-untyped-call]
        return tensor if self.axes == (0,) else tensor.movedim(self.axes, tuple(range(len(self.axes))))

    def rows(self, tensor: Tensor) -> Tensor:
        """All units' rows, (num_units, *row_shape); a copy where no view can show them so."""
        view = self.view(tensor)
        return view if len(self.axes) == 1 else view.flatten(0, len(self.axes) - 1)

    def take(self, tensor: Tensor, units: Tensor) -> Tensor:
        """The rows of some units, (num_taken, *row_shape), as a copy; `units` int64."""
        view = self.view(tensor)
        return view.index_select(0, units) if len(self.axes) == 1 else view[self.index(tensor.shape, units)]

    def put(self, tensor: Tensor, units: Tensor, rows: Tensor) -> None:
        """Overwrite the rows of some units in place; the caller sees to `no_grad`."""
        view = self.view(tensor)
        if len(self.axes) == 1:
            view.index_copy_(0, units, rows)
        else:
            view.index_put_(self.index(tensor.shape, units), rows)

    def index(self, shape: Sequence[int], units: Tensor) -> tuple[Tensor, ...]:
        """What selects units in the view of a tensor of this shape: one (num_taken,) int64 for each axis."""
        return (units,) if len(self.axes) == 1 else torch.unravel_index(units, self.unit_shape(shape))

    def unit_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """How many units a tensor of this shape has along each of the units' axes."""
        sizes = self._sizes(shape)
        return tuple(sizes[axis] for axis in self.axes)

    def num_units(self, shape: Sequence[int]) -> int:
        """How many units a tensor of this shape has."""
        return math.prod(self.unit_shape(shape))

    def few_units(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the smallest tensor of this layout that has neighbors, two, along each of the units' axes."""
        sizes = self._sizes(shape)
        for axis in self.axes:
            sizes[axis] = min(sizes[axis], 2)
        return (sizes[0] * sizes[1], *sizes[2:]) if self.groups > 1 else tuple(sizes)

    def elements(self, shape: Sequence[int], units: Tensor) -> Tensor:
        """Where the weights of some units are in a flat tensor of this shape, (num_taken, row_numel), int64."""
        places = torch.arange(math.prod(shape), device=units.device).reshape(tuple(shape))
        found = self.take(places, units)
        return found.flatten(1) if found.dim() > 1 else found[:, None]

    def whole(self, rows: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of `rows`: a tensor of this shape made of all units' rows, as a new tensor."""
        tensor = rows.new_empty(tuple(shape))
        view = self.view(tensor)
        view.copy_(rows.reshape(view.shape))
        return tensor

    def _sizes(self, shape: Sequence[int]) -> list[int]:
        return [self.groups, shape[0] // self.groups, *shape[1:]] if self.groups > 1 else list(shape)


ROWS = UnitAxes()
"""Units along axis 0: linear layers and convolutions."""
