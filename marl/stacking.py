"""Seeds as a batch dimension: networks of one structure, computed as one.

On small tasks a training step costs what its operations cost to start, not what they compute. `stack_learners` turns R
learners into one, whose networks' parameters have a leading dimension of R; given inputs with that leading
dimension it computes what the R modules would. Networks, losses and learner are written for any leading dimensions, so
that nothing is written twice.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.optim import Optimizer

from marl.errors import SettingsError
from marl.layers import GroupedLinear, StackedGroupedLinear, StackedGRUCell, StackedLinear
from marl.learner import Learner, keep_roots_fast

Module = TypeVar("Module", bound=nn.Module)

__all__ = ["load_learner", "load_module", "load_optimizer", "stack_learners", "stack_modules", "stack_optimizers"]

STACKED_FORMS: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    nn.Linear: StackedLinear,
    nn.GRUCell: StackedGRUCell,
    GroupedLinear: StackedGroupedLinear,
}


def stack_learners(learners: Sequence[Learner]) -> Learner:
    """One learner for R learners of the same settings, which train side by side on episodes (R, B).

    It goes on where they stand, and gives each what it would have alone: its loss, its bound on the gradient.

    Raises:
        SettingsError: learners of different structure, or none.
    """
    online, target = (stack_modules([getattr(each, part) for each in learners]) for part in ("online", "target"))
    target.requires_grad_(False)
    optimizer = stack_optimizers([each.optimizer for each in learners], list(online.parameters()))
    return replace(learners[0], online=online, target=target, optimizer=optimizer)


def load_learner(learner: Learner, stacked: Learner, seed: int) -> None:
    """Let a learner go on where one of the seeds of a stacked learner stands."""
    load_module(learner.online, stacked.online, seed)
    load_module(learner.target, stacked.target, seed)
    load_optimizer(learner.optimizer, stacked.optimizer, seed)
    learner.synced_at = stacked.synced_at


def stack_modules(modules: Sequence[Module]) -> Module:
    """One module for R modules of one structure: parameters of shape (R, ...), under the same names.

    Raises:
        SettingsError: there are no modules, their structures differ, or one of their layers has no stacked form.

    >>> seeds = [nn.Sequential(nn.Linear(3, 4), nn.ReLU()) for _ in range(5)]
    >>> x = torch.randn(5, 2, 3)
    >>> torch.allclose(stack_modules(seeds)(x)[2], seeds[2](x[2]), atol=1e-6)
    True
    """
    if not modules:
        raise SettingsError("asked to stack modules, found none: give at least one seed")
    _check_structures(modules)
    # a module that holds others keeps its class
    return cast(Module, _stacked([copy.deepcopy(module) for module in modules]))


def load_module(module: nn.Module, stacked: nn.Module, seed: int) -> None:
    """Give a module the parameters of one of the R seeds of a stacked one.

    >>> seeds, fresh = [nn.Linear(3, 4) for _ in range(5)], nn.Linear(3, 4)
    >>> load_module(fresh, stack_modules(seeds), seed=2)
    >>> torch.equal(fresh.weight, seeds[2].weight)
    True
    """
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(stacked.get_parameter(name)[seed])


def stack_optimizers(optimizers: Sequence[Optimizer], parameters: Sequence[nn.Parameter]) -> Optimizer:
    """One optimizer of stacked parameters, which goes on where R optimizers of one kind stand.

    Exact for optimizers that treat each element by itself, as RMSprop and Adam do.

    Raises:
        SettingsError: the optimizers took different numbers of steps.
    """
    optimizer = type(optimizers[0])(parameters, **optimizers[0].defaults)
    keep_roots_fast(optimizer)
    owned = [[parameter for group in each.param_groups for parameter in group["params"]] for each in optimizers]
    for parameter, *seeds in zip(parameters, *owned, strict=True):
        states = [each.state.get(seed, {}) for each, seed in zip(optimizers, seeds, strict=True)]
        steps = {float(state.get("step", 0)) for state in states}
        if len(steps) > 1:
            raise SettingsError(f"asked to stack optimizers after {sorted(steps)} steps: all must have taken as many")
        for key, first in states[0].items():
            values = [state[key] for state in states]
            optimizer.state[parameter][key] = torch.stack(values) if first.ndim else first.clone()
    return optimizer


def load_optimizer(optimizer: Optimizer, stacked: Optimizer, seed: int) -> None:
    """Give an optimizer the state of one of the R seeds of a stacked one."""
    for group, all_seeds in zip(optimizer.param_groups, stacked.param_groups, strict=True):
        for parameter, stack in zip(group["params"], all_seeds["params"], strict=True):
            for key, value in stacked.state[stack].items():
                optimizer.state[parameter][key] = (value[seed] if value.ndim else value).clone()


def _check_structures(modules: Sequence[nn.Module]) -> None:
    shapes = [{name: parameter.shape for name, parameter in module.named_parameters()} for module in modules]
    for number, module in enumerate(modules):
        if shapes[number] != shapes[0] or str(module) != str(modules[0]):
            raise SettingsError(
                f"asked to stack {len(modules)} modules, but number {number} differs from number 0 in its layers or "
                "their shapes: build all seeds from the same settings"
            )


def _require_plain(layers: Sequence[nn.Module]) -> None:
    """What hangs on a layer, as frozen rows do, has no place in its stacked form."""
    for layer in layers:
        for name, child in layer.named_children():
            raise SettingsError(
                f"asked to stack a {type(layer).__name__}, found {name!r} ({type(child).__name__}) on it: stack "
                "learners before they are operated on, or after surgery.flatten has made them plain"
            )


def _stacked(modules: Sequence[nn.Module]) -> nn.Module:
    """The first of the modules, with stacked layers in place of its own; takes the modules apart."""
    first = modules[0]
    for layer, form in STACKED_FORMS.items():
        if isinstance(first, layer):
            _require_plain(modules)
            return form(modules)
    own = [*first.named_parameters(recurse=False), *first.named_buffers(recurse=False)]
    if own:
        raise SettingsError(
            f"asked to stack a {type(first).__name__}, found its own tensor {own[0][0]!r}: only "
            f"{', '.join(layer.__name__ for layer in STACKED_FORMS)} have a stacked form"
        )
    for name, _ in list(first.named_children()):
        setattr(first, name, _stacked([module.get_submodule(name) for module in modules]))
    return first
