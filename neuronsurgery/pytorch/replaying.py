"""Steps of young rows, taken anew with what a parameter shares as it was when the parameter was of their age.

Beside state of its own shape, a parameter has numbers that belong to all of its rows: the count of steps, products of
decay rates, rates that shrink (NAdam, RAdam, Adamax, ASGD, Adagrad), or its group has them (schedule-free). They are
right for rows as old as the parameter. A young row's step is therefore **replayed**: the class's own `step` runs on a
scratch parameter made of the rows as they were before the step, with those numbers as they are at the rows' age. What
comes out, weights and state, is what a fresh parameter would have, by the class's own arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from neuronsurgery.pytorch.fresh_state import Group, is_shared, own_step, scratch_optimizer, scratch_options
from neuronsurgery.pytorch.sharding import held
from neuronsurgery.pytorch.unit_axes import UnitAxes

__all__ = ["Before", "Shared", "replay"]

At = Callable[[float, Group], float]
"""A shared number after so many steps, under the settings of a group."""
Ages = NDArray[np.float64]


def _always(ages: Ages, step: float, group: Group) -> NDArray[np.bool_]:
    return np.ones(len(ages), np.bool_)


@dataclass(frozen=True, eq=False)
class Shared:
    """What all rows of a parameter share, as functions of how many steps it took.

    `state` and `group`: the numbers in the parameter's state and in its group; `count` is the one among them that
    counts the steps. `matters(ages, step, group)`, (r,) float64 -> (r,) bool: for rows of which ages they differ from
    those of a parameter that took `step` steps.
    """

    state: Mapping[str, At] = field(default_factory=dict)
    group: Mapping[str, At] = field(default_factory=dict)
    count: str = "step"
    matters: Callable[[Ages, float, Group], NDArray[np.bool_]] = _always

    def counted(self, state: Mapping[str, Any], group: Group) -> Any:
        """The count of steps that the parameter took, 0 before the first."""
        return (group if self.count in self.group else state).get(self.count, 0)


@dataclass
class Before:
    """Young rows as they were before a step: (r, *row_shape) each; the gradient as it came, maybe from a closure."""

    weights: Tensor
    gradient: Tensor | None
    state: dict[str, Tensor]

    @staticmethod
    def of(optimizer: Optimizer, parameter: nn.Parameter, young: Rows) -> Before:
        """Copies of the rows; some classes overwrite the gradient in their step."""

        def take(tensor: Tensor) -> Tensor:
            return young.axes.take(held(tensor.detach()), young.rows)

        state = {
            key: take(entry)
            for key, entry in optimizer.state.get(parameter, {}).items()
            if isinstance(entry, Tensor) and not is_shared(key, entry, parameter)
        }
        before = Before(take(parameter), None, state)
        before.take_gradient(optimizer, parameter, young)
        return before

    def take_gradient(self, optimizer: Optimizer, parameter: nn.Parameter, young: Rows) -> None:
        """Copy the rows' gradient; a gradient scaler leaves its factor on an optimizer that divides by it itself."""
        if parameter.grad is None:
            self.gradient = None
            return
        self.gradient = young.axes.take(held(parameter.grad.detach()), young.rows)
        scale = vars(optimizer).get("grad_scale")
        if scale is not None:
            self.gradient = self.gradient / scale.to(self.gradient)


class Rows(Protocol):
    """Young rows of one parameter, as the step hooks keep them."""

    rows: Tensor
    births: Tensor
    axes: UnitAxes
    step: float | Tensor | None


def replay(
    shared: Shared, optimizer: Optimizer, parameter: nn.Parameter, group: Group, young: Rows, before: Before
) -> bool:
    """Take the last step of young rows anew, each birth with the shared numbers of its age; return whether it counted.

    A step that did not count for the parameter, or had no gradient, changes nothing. It reads the count on the host.
    """
    state = optimizer.state.get(parameter, {})
    assert young.step is not None, "the step hooks come in pairs"
    if parameter.grad is None or float(shared.counted(state, group)) - float(young.step) != 1:
        return False
    gradient = before.gradient
    if gradient is None:
        return False
    for birth in sorted(set(young.births.tolist())):
        which = (young.births == birth).nonzero().squeeze(1)
        part = Before(
            before.weights[which], gradient[which], {key: entry[which] for key, entry in before.state.items()}
        )
        weights, after = stepped(shared, optimizer, group, state, part, float(young.step) - birth)
        rows = young.rows[which]
        young.axes.put(held(parameter), rows, weights.to(parameter.dtype))
        for key in part.state:
            young.axes.put(held(state[key]), rows, after[key].to(state[key].dtype))
    return True


def stepped(
    shared: Shared, optimizer: Optimizer, group: Group, state: Mapping[str, Any], before: Before, age: float
) -> tuple[Tensor, Mapping[str, Any]]:
    """One step of the class on rows of an age: their weights and state after it, as new tensors.

    Rows of age 0 step from no state at all, so that what a class does in a parameter's first step, it does.
    """
    scratch = _SCRATCH.get(optimizer)
    if scratch is None:
        scratch = _SCRATCH[optimizer] = scratch_optimizer(optimizer, group, nn.Parameter(torch.zeros(1)))
    parameter = nn.Parameter(before.weights.clone())
    assert before.gradient is not None
    parameter.grad = before.gradient.clone()
    numbers = {key: _like(entry) for key, entry in state.items() if key not in before.state}
    numbers |= {key: _like(state[key], at(age, group)) for key, at in shared.state.items() if key in state}
    scratch.param_groups[0].update(scratch_options(group, keeps_decay=True))
    scratch.param_groups[0].update({key: _like(group[key], at(age, group)) for key, at in shared.group.items()})
    scratch.param_groups[0]["params"] = [parameter]
    scratch.state.clear()
    if age:
        scratch.state[parameter] = {key: entry.clone() for key, entry in before.state.items()} | numbers
    own_step(type(optimizer))(scratch)
    return parameter.detach(), scratch.state[parameter]


_SCRATCH: WeakKeyDictionary[Optimizer, Optimizer] = WeakKeyDictionary()


def _like(entry: Any, value: float | None = None) -> Any:
    """A shared number as the class keeps it, on the host: this value, or a copy of what there is."""
    if isinstance(entry, Tensor):
        copied = entry.detach().to("cpu", copy=True)
        return copied if value is None else copied.fill_(value)
    return entry if value is None else type(entry)(value)
