"""Layers that torch does not have: groups of linear layers, and layers of many seeds.

A stacked layer is R layers in one: parameters and inputs have a leading dimension of R, the number of seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from einops import einsum
from torch import Tensor, nn

__all__ = ["GroupedLinear", "StackedGRUCell", "StackedGroupedLinear", "StackedLinear"]


class GroupedLinear(nn.Module):
    """A linear layer for each of several groups of units: (..., groups, in_features) to (..., groups, out_features).

    Weights and biases are drawn as in `nn.Linear`.

    >>> GroupedLinear(4, 3, 5)(torch.randn(7, 4, 3)).shape
    torch.Size([7, 4, 5])
    """

    def __init__(self, num_groups: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_groups, in_features, out_features))
        self.bias = nn.Parameter(torch.empty(num_groups, out_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights and biases anew."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        for parameter in (self.weight, self.bias):
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = einsum(x, self.weight, "... k i, k i o -> ... k o") + self.bias
        return out


class StackedLinear(nn.Module):
    """R linear layers: (R, ..., in_features) to (R, ..., out_features).

    >>> StackedLinear([nn.Linear(3, 4), nn.Linear(3, 4)])(torch.randn(2, 7, 6, 3)).shape
    torch.Size([2, 7, 6, 4])
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.weight = _stacked([layer.weight for layer in layers])
        self.bias = _stacked([layer.bias for layer in layers])

    def forward(self, x: Tensor) -> Tensor:
        return _linear(x, self.weight, self.bias)


class StackedGroupedLinear(nn.Module):
    """R grouped linear layers: (R, ..., groups, in_features) to (R, ..., groups, out_features).

    >>> StackedGroupedLinear([GroupedLinear(4, 3, 5), GroupedLinear(4, 3, 5)])(torch.randn(2, 7, 4, 3)).shape
    torch.Size([2, 7, 4, 5])
    """

    def __init__(self, layers: Sequence[GroupedLinear]) -> None:
        super().__init__()
        self.weight = _stacked([layer.weight for layer in layers])
        self.bias = _stacked([layer.bias for layer in layers])

    def forward(self, x: Tensor) -> Tensor:
        # one product for all layers and groups, whose result keeps the order of the product: little is moved
        rows = x.flatten(1, -3).transpose(1, 2).flatten(0, 1)
        out = torch.baddbmm(self.bias.flatten(0, 1).unsqueeze(1), rows, self.weight.flatten(0, 1))
        by_group = out.view(*self.weight.shape[:2], *out.shape[1:])
        return by_group.transpose(1, 2).reshape(*x.shape[:-1], -1)


class StackedGRUCell(nn.Module):
    """R GRU cells: inputs (R, M, I) and hidden states (R, M, H) to hidden states (R, M, H), or all steps at once.

    The formulas are those of `torch.nn.GRUCell`, from Cho et al. 2014.

    >>> cell = StackedGRUCell([nn.GRUCell(3, 4), nn.GRUCell(3, 4)])
    >>> cell(torch.randn(2, 7, 3), torch.zeros(2, 7, 4)).shape
    torch.Size([2, 7, 4])
    """

    def __init__(self, cells: Sequence[nn.GRUCell]) -> None:
        super().__init__()
        self.weight_ih = _stacked([cell.weight_ih for cell in cells])
        self.weight_hh = _stacked([cell.weight_hh for cell in cells])
        self.bias_ih = _stacked([cell.bias_ih for cell in cells])
        self.bias_hh = _stacked([cell.bias_hh for cell in cells])

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        return self.unroll(x) if hidden is None else self.step(x, hidden)

    def step(self, x: Tensor, hidden: Tensor) -> Tensor:
        """States (R, M, H) after inputs (R, M, I) and states (R, M, H)."""
        reset_x, update_x, candidate_x = _linear(x, self.weight_ih, self.bias_ih).chunk(3, dim=-1)
        reset_h, update_h, candidate_h = _linear(hidden, self.weight_hh, self.bias_hh).chunk(3, dim=-1)
        reset, update = torch.sigmoid(reset_x + reset_h), torch.sigmoid(update_x + update_h)
        return torch.lerp(torch.tanh(candidate_x + reset * candidate_h), hidden, update)

    def unroll(self, x: Tensor) -> Tensor:
        """States (R, T, M, H) after each of the inputs (R, T, M, I), from states of zeros."""
        hidden = x.new_zeros(x.shape[0], x.shape[2], self.weight_hh.shape[-1])
        return torch.stack([hidden := self.step(each, hidden) for each in x.unbind(1)], dim=1)


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """R products: x (R, ..., I), weight (R, O, I) and bias (R, O) to (R, ..., O)."""
    out = torch.baddbmm(bias.unsqueeze(1), x.flatten(1, -2), weight.transpose(1, 2))
    return out.reshape(*x.shape[:-1], -1)


def _stacked(parameters: Sequence[Tensor]) -> nn.Parameter:
    return nn.Parameter(torch.stack([parameter.detach() for parameter in parameters]))
