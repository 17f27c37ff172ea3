"""Hidden layers of many seeds whose units may be composite: what runs, while the library keeps the books.

A layer that the library operated on holds its frozen members in a bank of its own, which differ from seed to seed. Side
by side they are three products: the layer, all frozen members, and a table that adds these to their units with their
sign. Members that retire fade in that table.

Where outgoing weights were drawn anew, frozen members also add to what the consumer computes, past its weights. That is
handed on behind the units, as more inputs than the consumer has weights for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from marl.layers import StackedLinear
from marl.surgery import FrozenRows

__all__ = ["Lack", "StackedConsumer", "StackedUnits"]

Lack = Literal["nothing", "knowledge", "compensation", "outgoing"]
"""What composites are to be without, to see what it is good for: one of their members, or the outgoing weights that
their unit had, which are drawn anew."""


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
        rows, added, added_to_frozen = _apart(x.flatten(1, -2), self.weight)
        units = self.activation_fn(_products(rows, self.weight, self.bias, added))
        if self.frozen_weight is not None:
            frozen = self.activation_fn(_products(rows, self.frozen_weight, self.frozen_bias, added_to_frozen))
            units = torch.baddbmm(units, frozen, self.shares)
            if self.differences is not None:
                units = torch.cat([units, torch.bmm(frozen, self.differences)], dim=-1)
        out: Tensor = units.reshape(*x.shape[:-1], -1)
        return out

    def take(self, rows: Sequence[FrozenRows | None], *, lack: Lack, differences: Sequence[Tensor] = ()) -> None:
        """Take over the frozen members that each seed has now, those that are lacking left out.

        `differences` are what they add to the consumer, if anything: for each seed (K, O + L), to its rows and to its
        frozen rows.
        """
        self.frozen_weight: Tensor | None = None
        self._fading: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        most = max((len(each.unit) for each in rows if each is not None), default=0)
        if most == 0:
            return
        num_seeds, num_units, num_inputs = self.weight.shape
        zeros = self.weight.detach().new_zeros
        self.frozen_weight, self.frozen_bias = zeros(num_seeds, most, num_inputs), zeros(num_seeds, most)
        shares = zeros(num_seeds, most, num_units)
        births, retire = zeros(num_seeds, most), torch.full((num_seeds, most), torch.inf)
        fades = zeros(num_seeds, most)
        for seed, each in enumerate(rows):
            if each is not None:
                count = len(each.unit)
                self.frozen_weight[seed, :count], self.frozen_bias[seed, :count] = each.weight, each.bias
                shares[seed, :count] = _signs(each, lack).unsqueeze(1) * F.one_hot(each.unit, num_units)
                births[seed, :count], retire[seed, :count], fades[seed, :count] = each.birth, each.retire, each.fade
        whole = torch.cat([shares, _padded(differences, like=shares)], dim=-1)
        self._share_out(whole)
        if retire.isfinite().any():
            self._fading = (whole, births, retire, fades)

    def fade_to(self, step: int) -> None:
        """Bring members that retire to where they are after this step of the optimizer; all gone, they cost nothing."""
        if self._fading is not None:
            whole, births, retire, fades = self._fading
            left = torch.minimum(fades, (1 - (step - births) / retire).clamp(0, 1))
            table = whole * left.unsqueeze(-1)
            self._share_out(table)
            if not table.any():
                self.frozen_weight = self._fading = None

    def _share_out(self, table: Tensor) -> None:
        """Of what each frozen member adds: to the units, and to the consumer."""
        num_units = self.weight.shape[1]
        self.shares = table[..., :num_units]
        self.differences = table[..., num_units:] if table.shape[-1] > num_units else None


class StackedConsumer(nn.Module):
    """R linear layers behind hidden ones: (R, ..., in_features), and differences behind these, to (R, ..., O).

    >>> layer = StackedConsumer(StackedLinear([nn.Linear(3, 4), nn.Linear(3, 4)]))
    >>> x, added = torch.randn(2, 7, 3), torch.randn(2, 7, 4)
    >>> torch.allclose(layer(torch.cat([x, added], dim=-1)), layer(x) + added, atol=1e-6)
    True
    """

    def __init__(self, linear: StackedLinear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows, added, _ = _apart(x.flatten(1, -2), self.weight)
        return _products(rows, self.weight, self.bias, added).reshape(*x.shape[:-1], -1)


def _apart(rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What a layer reads, what is added to its rows, and what to its frozen rows."""
    num_outputs, num_inputs = weight.shape[1:]
    if rows.shape[-1] == num_inputs:
        return rows, None, None
    read, added, added_to_frozen = rows.tensor_split((num_inputs, num_inputs + num_outputs), dim=-1)
    return read, added, added_to_frozen


def _products(rows: Tensor, weight: Tensor, bias: Tensor, added: Tensor | None) -> Tensor:
    start = bias.unsqueeze(1) if added is None else bias.unsqueeze(1) + added
    return torch.baddbmm(start, rows, weight.transpose(1, 2))


def _padded(differences: Sequence[Tensor], *, like: Tensor) -> Tensor:
    """Those of all seeds as one tensor (R, K, O + L), zeros where a seed has fewer members than others."""
    padded = like.new_zeros(*like.shape[:2], max((each.shape[1] for each in differences), default=0))
    for seed, each in enumerate(differences):
        padded[seed, : len(each), : each.shape[1]] = each
    return padded


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
