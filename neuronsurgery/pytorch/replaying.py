"""Steps of young rows, taken again by the optimizer's own class as a parameter of their age would take them.

Whatever a class computes from the count of steps, and whatever it does in a first step, is right for a row if the class
itself steps on a scratch parameter made of that row: its weights, gradient and state as they were before the step, and
with what all rows share (`shared_entries`) as it is at the row's age. So one mechanism serves every optimizer that
treats elements apart. Whether a class can be replayed is tried on a scratch parameter, not believed of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neuronsurgery.pytorch.fresh_state import is_shared, learning, own_step, scratch_of
from neuronsurgery.pytorch.shared_entries import STATE_RULES, Group, count_of, group_rules, number
from neuronsurgery.pytorch.unit_axes import ROWS, UnitAxes
from neuronsurgery.pytorch.young import Young

__all__ = ["Rule", "learn", "remember", "replay", "without_grown_up"]

_MANY = 10**6
"""Steps after which a parameter counts as old."""

CHECK_EVERY = 64
"""Steps of the parameter between two looks whether rows have grown up."""


@dataclass(frozen=True)
class Rule:
    """What a class of optimizers does for rows that are younger than their parameter.

    `first`: a first step is unlike any step from the state of a fresh parameter. `ages`: steps go by what all rows
    share. `unexplained`: what changes from step to step, by no known rule; then neither can be replayed.
    """

    first: bool
    ages: bool
    unexplained: tuple[str, ...] = ()


@dataclass(frozen=True)
class Point:
    """A scratch parameter after a step: its weights, its state, its group."""

    weights: Tensor
    state: Mapping[str, Any]
    group: Group


class Stepper:
    """Takes single steps of an optimizer's class on scratch parameters; it refers to no optimizer in use."""

    def __init__(self, optimizer: Optimizer, group: Group, like: Tensor) -> None:
        self.scratch = scratch_of(optimizer, group, nn.Parameter(like.detach().clone()))
        self.own_step = own_step(type(optimizer))

    def step(self, group: Group, weights: Tensor, gradient: Tensor, state: Mapping[str, Any]) -> Point:
        """Step once from a state, `{}` for the first; nothing that is passed is changed."""
        parameter = nn.Parameter(weights.clone())
        parameter.grad = gradient.clone()
        copied = {key: entry.clone() if isinstance(entry, Tensor) else entry for key, entry in state.items()}
        scratch = self.scratch
        scratch.param_groups = [{**group, "params": [parameter], "differentiable": False}]
        if "train_mode" in group:  # a schedule-free optimizer may be in its other mode while it is operated with
            scratch.param_groups[0]["train_mode"] = True
        scratch.state = defaultdict(dict, {parameter: copied} if copied else {})
        self.own_step(scratch)
        point = Point(parameter.detach(), scratch.state[parameter], scratch.param_groups[0])
        scratch.param_groups, scratch.state = [], defaultdict(dict)
        return point

    def step_at(
        self, num_steps: int, group: Group, weights: Tensor, gradient: Tensor, state: Mapping[str, Any]
    ) -> Point:
        """Step once as a parameter that has taken `num_steps`; `state` as any parameter of the class has it."""
        shared = {name: _like(group[name], rule(group, num_steps)) for name, rule in group_rules(group).items()}
        entries = {
            key: _like(entry, STATE_RULES[key](group, num_steps))
            if key in STATE_RULES and is_shared(key, entry, weights)
            else entry
            for key, entry in state.items()
        }
        return self.step({**group, **shared}, weights, gradient, entries if num_steps else {})


def _like(entry: Any, value: float) -> Any:
    """A number in the place of another one, of its type; a tensor on its device."""
    if isinstance(entry, Tensor):
        return torch.full_like(entry, value)
    return type(entry)(value)


# -- what a class does -----------------------------------------------------------------------------------------------


def learn(optimizer: Optimizer, group: Group, parameter: nn.Parameter, axes: UnitAxes = ROWS) -> Rule:
    """Try on scratch parameters what an optimizer's class does for young rows.

    Raises `OptimizerError` where its class cannot be built from the parameter's group or fails to step.
    """
    with learning(optimizer, parameter):
        generator = torch.Generator().manual_seed(0)
        dtype = torch.float64 if parameter.dtype in (torch.float64, torch.complex128) else torch.float32
        shape = (5, *axes.few_units(parameter.shape))
        weights, *gradients = torch.randn(shape, generator=generator).to(parameter.device, dtype)
        stepper = Stepper(optimizer, group, weights)
        points = _trajectory(stepper, group, weights, gradients)
        if unexplained := _unexplained(group, points, weights):
            return Rule(False, False, unexplained)
        other = Stepper(optimizer, group, weights)  # what the first object may keep beside its state it has not
        third = points[2]
        again = other.step_at(3, group, third.weights, gradients[3], third.state)
        if not _agree(again, points[3]):
            return Rule(False, False, ("something beside its state",))
        old = other.step_at(_MANY, group, third.weights, gradients[3], third.state)
        if not torch.equal(old.weights, again.weights):
            return Rule(first=True, ages=True)
        return Rule(first=_has_first_steps(other, group, weights, gradients[0]), ages=False)


def _trajectory(stepper: Stepper, group: Group, weights: Tensor, gradients: list[Tensor]) -> list[Point]:
    points = [stepper.step_at(0, group, weights, gradients[0], {})]
    for gradient in gradients[1:]:
        last = points[-1]
        points.append(stepper.step(last.group, last.weights, gradient, last.state))
    return points


def _has_first_steps(stepper: Stepper, group: Group, weights: Tensor, gradient: Tensor) -> bool:
    """Whether a parameter's first step is unlike the first of rows that have a fresh parameter's state by then."""
    settled = {**group, "weight_decay": 0.0} if "weight_decay" in group else group
    fresh = stepper.step_at(0, settled, weights, torch.zeros_like(weights), {})
    first = stepper.step_at(0, group, weights, gradient, {})
    return not _agree(first, stepper.step_at(_MANY, group, weights, gradient, fresh.state))


def _agree(point: Point, other: Point) -> bool:
    pairs = [(point.weights, other.weights)] + [
        (entry, other.state[key])
        for key, entry in point.state.items()
        if isinstance(entry, Tensor) and entry.shape == point.weights.shape
    ]
    return all(torch.allclose(one, two, rtol=1e-5, atol=1e-8) for one, two in pairs)


def _unexplained(group: Group, points: list[Point], weights: Tensor) -> tuple[str, ...]:
    """The names of what all rows share, and what changes from step to step otherwise than its rule says."""
    states = [{key: entry for key, entry in point.state.items() if is_shared(key, entry, weights)} for point in points]
    groups = [{key: entry for key, entry in point.group.items() if number(entry) is not None} for point in points]
    found = [key for key in states[-1] if not _follows(key, states, STATE_RULES.get(key), group)]
    found += [key for key in groups[-1] if not _follows(key, groups, group_rules(group).get(key), group)]
    return tuple(dict.fromkeys(found))


def _follows(key: str, entries: list[dict[str, Any]], rule: Any, group: Group) -> bool:
    values = [number(one.get(key)) for one in entries]
    found = [value for value in values if value is not None]
    if rule is None or len(found) < len(values):
        return all(value == values[0] for value in values)
    expected = [rule(group, place + 1) for place in range(len(values))]
    return all(abs(value - one) <= 1e-5 * abs(one) for value, one in zip(found, expected, strict=True))


# -- in the step hooks -----------------------------------------------------------------------------------------------

_STEPPERS: WeakKeyDictionary[Optimizer, Stepper] = WeakKeyDictionary()


def _stepper(optimizer: Optimizer, group: Group, like: Tensor) -> Stepper:
    if optimizer not in _STEPPERS:
        _STEPPERS[optimizer] = Stepper(optimizer, group, like)
    return _STEPPERS[optimizer]


def remember(optimizer: Optimizer, parameter: nn.Parameter, young: Young) -> None:
    """Keep what the young rows' next step starts from; their gradient comes later where a closure computes it."""
    young.weights = young.axes.take(parameter, young.rows)
    young.state = {
        key: entry if is_shared(key, entry, parameter) else young.axes.take(entry, young.rows)
        for key, entry in optimizer.state.get(parameter, {}).items()
    }
    young.gradient = None if parameter.grad is None else young.axes.take(parameter.grad, young.rows)


def replay(optimizer: Optimizer, parameter: nn.Parameter, group: Group, young: Young, sweep: bool) -> Young | None:
    """Take the young rows' last step again, each at its age, and write weights and state.

    Where nothing counts the steps, only the first is taken again.
    """
    count = count_of(optimizer, parameter, group)
    if young.gradient is None or not young.state:
        return young
    assert young.weights is not None, "the step hooks come in pairs"
    if count is not None and (young.step is None or count - float(young.step) != 1):
        return young
    stepper = _stepper(optimizer, group, young.weights)
    _follow_scaler(stepper.scratch, optimizer)
    settings = {key: entry for key, entry in group.items() if key not in ("params", "param_names")}
    state = optimizer.state[parameter]
    for born, places in young.cohorts():
        age = 0 if count is None else int(count - 1 - born)
        assert age >= 0, "rows born later than the step before are dropped before the step"
        rows = young.rows[places]
        kept = {k: e if is_shared(k, e, parameter) else e[places] for k, e in young.state.items()}
        point = stepper.step_at(age, settings, young.weights[places], young.gradient[places], kept)
        young.axes.put(parameter, rows, point.weights)
        for key, entry in point.state.items():
            if isinstance(entry, Tensor) and not is_shared(key, state[key], parameter):
                young.axes.put(state[key], rows, entry.to(state[key]))
    return None if count is None else young


def _follow_scaler(scratch: Optimizer, optimizer: Optimizer) -> None:
    """A gradient scaler leaves its factor on an optimizer that divides by it itself."""
    for name in ("grad_scale", "found_inf"):
        if name in vars(optimizer):
            setattr(scratch, name, vars(optimizer)[name])
        else:
            vars(scratch).pop(name, None)


def without_grown_up(
    optimizer: Optimizer, parameter: nn.Parameter, group: Group, young: Young, step: float
) -> Young | None:
    """The rows whose next step still differs from their parameter's, which is looked at every `CHECK_EVERY` steps.

    It goes by births, count and settings alone: rows that were registered anew stay young exactly as long.
    """
    now = step - step % CHECK_EVERY
    if now <= young.checked_at:
        return young
    young.checked_at = now
    generator = torch.Generator().manual_seed(0)
    weights, *gradients = torch.randn((5, 2, 8), generator=generator).to(parameter.device, torch.float64)
    settings = {key: entry for key, entry in group.items() if key not in ("params", "param_names")}
    stepper = Stepper(optimizer, group, weights)
    last = _trajectory(stepper, settings, weights, gradients[:3])[-1]
    old = stepper.step_at(int(now), settings, last.weights, gradients[3], last.state).weights
    tolerance = 1e-14 if young.births.dtype is torch.float64 else 1e-7
    stays = torch.ones_like(young.rows, dtype=torch.bool)
    for born, places in young.cohorts():
        if born < now:
            young_step = stepper.step_at(int(now - born), settings, last.weights, gradients[3], last.state).weights
            stays[places] = bool(((young_step - old).abs() > tolerance * (old - last.weights).abs()).any())
    if bool(stays.all()):
        return young
    remaining = young.staying(parameter, stays, young.latest) if bool(stays.any()) else None
    if remaining is not None:
        remaining.checked_at = now
    return remaining
