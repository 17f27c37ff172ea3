"""Hidden layers of many seeds whose units may be composite: what runs, while the library keeps the books.

A layer that the library operated on holds its frozen members in a bank of its own, which differ from seed to seed. Side
by side they are three products: the layer, all frozen members, and a table that adds these to their units with their
sign. Members that retire fade in that table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from marl.layers import StackedLinear
from marl.surgery import FrozenRows

__all__ = ["Lack", "StackedUnits"]

Lack = Literal["nothing", "knowledge", "compensation"]
"""Members that composites are to be without, to see what they are good for."""


class StackedUnits(nn.Module):
    """R hidden layers, activation function included: (R, ..., in_features) to (R, ..., out_features).

    Its parameters are those of the linear layers, under the same names.

    >>> layer = StackedUnits(StackedLinear([nn.Linear(3, 4), nn.Linear(3, 4)]), nn.ReLU())
    >>> layer(torch.randn(2, 7, 6, 3)).shape, layer.num_rows
    (torch.Size([2, 7, 6, 4]), 0)
    """

    def __init__(self, linear: StackedLinear, activation_fn: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.activation_fn = activation_fn
        self.take((), lack="nothing")

    @property
    def num_rows(self) -> int:
        """Frozen members of the seed that has most."""
        return 0 if self.frozen_weight is None else self.frozen_weight.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(1, -2)
        units = self.activation_fn(torch.baddbmm(self.bias.unsqueeze(1), rows, self.weight.transpose(1, 2)))
        if self.frozen_weight is not None:
            frozen = torch.baddbmm(self.frozen_bias.unsqueeze(1), rows, self.frozen_weight.transpose(1, 2))
            units = torch.baddbmm(units, self.activation_fn(frozen), self.shares)
        out: Tensor = units.reshape(*x.shape[:-1], -1)
        return out

    def take(self, rows: Sequence[FrozenRows | None], *, lack: Lack) -> None:
        """Take over the frozen members that each seed has now, those that are lacking left out."""
        self.frozen_weight: Tensor | None = None
        self._fading: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        most = max((len(each.unit) for each in rows if each is not None), default=0)
        if most == 0:
            return
        num_seeds, num_units, num_inputs = self.weight.shape
        zeros = self.weight.detach().new_zeros
        self.frozen_weight, self.frozen_bias = zeros(num_seeds, most, num_inputs), zeros(num_seeds, most)
        whole = zeros(num_seeds, most, num_units)
        births, retire = zeros(num_seeds, most), torch.full((num_seeds, most), torch.inf)
        fades = zeros(num_seeds, most)
        for seed, each in enumerate(rows):
            if each is not None:
                count = len(each.unit)
                self.frozen_weight[seed, :count], self.frozen_bias[seed, :count] = each.weight, each.bias
                whole[seed, :count] = _signs(each, lack).unsqueeze(1) * F.one_hot(each.unit, num_units)
                births[seed, :count], retire[seed, :count], fades[seed, :count] = each.birth, each.retire, each.fade
        self.shares = whole
        if retire.isfinite().any():
            self._fading = (whole, births, retire, fades)

    def fade_to(self, step: int) -> None:
        """Bring members that retire to where they are after this step of the optimizer; all gone, they cost nothing."""
        if self._fading is not None:
            whole, births, retire, fades = self._fading
            left = torch.minimum(fades, (1 - (step - births) / retire).clamp(0, 1))
            self.shares = whole * left.unsqueeze(-1)
            if not self.shares.any():
                self.frozen_weight = self._fading = None


def _signs(rows: FrozenRows, lack: Lack) -> Tensor:
    """What each member counts; zero for those that are left out.

    Without knowledge a unit is its active member less the latest compensation: all older terms are its knowledge.
    """
    sign = rows.sign.to(rows.weight.dtype)
    if lack == "compensation":
        return sign.clamp(min=0)
    if lack == "knowledge":
        latest = torch.zeros(int(rows.unit.max()) + 1, dtype=rows.operation.dtype)
        latest.scatter_reduce_(0, rows.unit, rows.operation, "amax")
        return sign.clamp(max=0) * (rows.operation == latest[rows.unit])
    return sign
