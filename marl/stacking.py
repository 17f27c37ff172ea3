"""Seeds as a batch dimension: modules of one structure, computed as one.

On small tasks a training step costs what its operations cost to start, not what they compute. `stack_modules` turns R
modules of one structure into one whose weights have a leading dimension of R; given inputs with that leading dimension
it computes what the R modules would. Networks, losses and learner are written for any leading dimensions, so that
nothing is written twice.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from marl.errors import SettingsError

Module = TypeVar("Module", bound=nn.Module)

__all__ = ["StackedGRUCell", "StackedLinear", "load_module", "load_optimizer", "stack_modules", "stack_optimizers"]


def stack_modules(modules: Sequence[Module]) -> Module:
    """One module for R modules of one structure: parameters of shape (R, ...), under the same names.

    Raises:
        SettingsError: there are no modules, their structures differ, or a parameter is not that of an `nn.Linear` or
            an `nn.GRUCell`.

    >>> seeds = [nn.Sequential(nn.Linear(3, 4), nn.ReLU()) for _ in range(5)]
    >>> x = torch.randn(5, 2, 3)
    >>> stacked = stack_modules(seeds)
    >>> torch.allclose(stacked(x)[2], seeds[2](x[2]))
    True
    """
    if not modules:
        raise SettingsError("asked to stack modules, found none: give at least one seed")
    _check_structures(modules)
    stacked = _stacked([copy.deepcopy(module) for module in modules])
    return cast(Module, stacked)  # a module that holds others keeps its class


def load_module(module: nn.Module, stacked: nn.Module, seed: int) -> None:
    """Give a module the parameters of one of the R seeds of a stacked one.

    >>> seeds = [nn.Linear(3, 4) for _ in range(5)]
    >>> stacked, fresh = stack_modules(seeds), nn.Linear(3, 4)
    >>> load_module(fresh, stacked, seed=2)
    >>> torch.equal(fresh.weight, seeds[2].weight)
    True
    """
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(stacked.get_parameter(name)[seed])


class StackedLinear(nn.Module):
    """R linear layers on R inputs: (R, ..., in_features) to (R, ..., out_features).

    >>> StackedLinear([nn.Linear(3, 4), nn.Linear(3, 4)])(torch.randn(2, 7, 6, 3)).shape
    torch.Size([2, 7, 6, 4])
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.weight = _stacked_parameter([layer.weight for layer in layers])
        self.bias = _stacked_parameter([layer.bias for layer in layers])

    def forward(self, x: Tensor) -> Tensor:
        return _linear(x, self.weight, self.bias)


class StackedGRUCell(nn.Module):
    """R GRU cells on R inputs: (R, M, I) and hidden states (R, M, H) to hidden states (R, M, H).

    The formulas are those of `torch.nn.GRUCell`, by Cho et al. 2014.

    >>> cell = StackedGRUCell([nn.GRUCell(3, 4), nn.GRUCell(3, 4)])
    >>> cell(torch.randn(2, 7, 3), torch.zeros(2, 7, 4)).shape
    torch.Size([2, 7, 4])
    """

    def __init__(self, cells: Sequence[nn.GRUCell]) -> None:
        super().__init__()
        self.hidden_size = cells[0].hidden_size
        self.weight_ih = _stacked_parameter([cell.weight_ih for cell in cells])
        self.weight_hh = _stacked_parameter([cell.weight_hh for cell in cells])
        self.bias_ih = _stacked_parameter([cell.bias_ih for cell in cells])
        self.bias_hh = _stacked_parameter([cell.bias_hh for cell in cells])

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        return self._step(_linear(x, self.weight_ih, self.bias_ih), hidden)

    def unroll(self, x: Tensor) -> Tensor:
        """All hidden states (R, T, M, H) for inputs (R, T, M, I), from a hidden state of zeros."""
        hidden = x.new_zeros(x.shape[0], x.shape[2], self.hidden_size)
        states = []
        for gates in _linear(x, self.weight_ih, self.bias_ih).unbind(1):
            hidden = self._step(gates, hidden)
            states.append(hidden)
        return torch.stack(states, dim=1)

    def _step(self, input_gates: Tensor, hidden: Tensor) -> Tensor:
        hidden_gates = _linear(hidden, self.weight_hh, self.bias_hh)
        size = self.hidden_size
        gates = torch.sigmoid(input_gates[..., : 2 * size] + hidden_gates[..., : 2 * size])
        reset, update = gates[..., :size], gates[..., size:]
        candidate = torch.tanh(input_gates[..., 2 * size :] + reset * hidden_gates[..., 2 * size :])
        return candidate + update * (hidden - candidate)


def stack_optimizers(optimizers: Sequence[Optimizer], parameters: Sequence[nn.Parameter]) -> Optimizer:
    """One optimizer of stacked parameters, which goes on where R optimizers of one kind stand.

    Exact for optimizers that treat each element by itself, as RMSprop and Adam do.
    """
    optimizer = type(optimizers[0])(parameters, **optimizers[0].defaults)
    owned = [[p for group in each.param_groups for p in group["params"]] for each in optimizers]
    for parameter, *seeds in zip(parameters, *owned, strict=True):
        states = [each.state[p] for each, p in zip(optimizers, seeds, strict=True) if p in each.state]
        for key in states[0] if states else ():
            values = [state[key] for state in states]
            optimizer.state[parameter][key] = values[0].clone() if values[0].ndim == 0 else torch.stack(values)
    return optimizer


def load_optimizer(optimizer: Optimizer, stacked: Optimizer, seed: int) -> None:
    """Give an optimizer the state of one of the R seeds of a stacked one."""
    for group, all_seeds in zip(optimizer.param_groups, stacked.param_groups, strict=True):
        for parameter, stack in zip(group["params"], all_seeds["params"], strict=True):
            for key, value in stacked.state[stack].items():
                optimizer.state[parameter][key] = (value if value.ndim == 0 else value[seed]).clone()


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """R products: x (R, ..., I), weight (R, O, I) and bias (R, O) to (R, ..., O)."""
    rows = x.reshape(x.shape[0], -1, x.shape[-1])
    out = torch.baddbmm(bias.unsqueeze(1), rows, weight.transpose(1, 2))
    return out.reshape(*x.shape[:-1], -1)


def _check_structures(modules: Sequence[nn.Module]) -> None:
    shapes = [{name: p.shape for name, p in module.named_parameters()} for module in modules]
    for number, found in enumerate(shapes):
        if found != shapes[0] or str(modules[number]) != str(modules[0]):
            raise SettingsError(
                f"asked to stack {len(modules)} modules, but number {number} differs from number 0 in its layers or "
                "their shapes: build all seeds from the same settings"
            )


def _stacked(modules: Sequence[nn.Module]) -> nn.Module:
    """The first of the modules, with stacked layers in place of its own; takes the modules apart."""
    first = modules[0]
    if isinstance(first, nn.Linear):
        return StackedLinear([module for module in modules if isinstance(module, nn.Linear)])
    if isinstance(first, nn.GRUCell):
        return StackedGRUCell([module for module in modules if isinstance(module, nn.GRUCell)])
    own = [*first.named_parameters(recurse=False), *first.named_buffers(recurse=False)]
    if own:
        raise SettingsError(
            f"asked to stack {type(first).__name__}, found its own tensor {own[0][0]!r}: only linear layers and GRU "
            "cells have a stacked form"
        )
    for name, _ in list(first.named_children()):
        setattr(first, name, _stacked([module.get_submodule(name) for module in modules]))
    return first


def _stacked_parameter(parameters: Sequence[Tensor]) -> nn.Parameter:
    return nn.Parameter(torch.stack([parameter.detach() for parameter in parameters]))
