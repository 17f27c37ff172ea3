"""Trying out an optimizer class that is not known: what its rows share, and whether a count of steps is all of it."""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neuronsurgery.pytorch.fresh_state import Group, is_shared, own_step, scratch_optimizer
from neuronsurgery.pytorch.models import random_states_kept
from neuronsurgery.pytorch.replaying import Ages, At, Before, Shared, stepped

__all__ = ["Trial", "tried_out"]

_NUM_STEPS = 8


@dataclass(frozen=True)
class Trial:
    """What was found: `shared`, None where a count does not tell it, and `excess`.

    `excess`: how much larger the updates of rows made fresh are than a fresh parameter's, at first or at most; NaN
    where that cannot be tried.
    """

    shared: Shared | None
    excess: float


def tried_out(optimizer: Optimizer, group: Group) -> Trial:
    """Try a class out on scratch parameters with the settings of a group, on the host."""
    shared = None
    with random_states_kept([]), torch.enable_grad(), suppress(Exception):
        shared = _shared(optimizer, list(_history(optimizer, group)))
    try:
        with random_states_kept([]), torch.enable_grad():
            return Trial(shared, _excess(optimizer, group, shared))
    except Exception:
        return Trial(shared, math.nan)


def _shared(optimizer: Optimizer, history: list[Moment]) -> Shared | None:
    """What all rows of a parameter share in this class: nothing, or a count that tells all of it; None otherwise.

    A parameter of the class took some steps; each is taken anew from the state before it with nothing shared but the
    count, and has to come out the same.
    """
    changing_state = _changing([moment.shared for moment in history])
    changing_group = _changing([moment.group for moment in history])
    if not changing_state and not changing_group:
        return Shared()
    count = next((key for key in ("step", "k") if key in (changing_state or changing_group)), None)
    if count is None or len(changing_state | changing_group) > 1:
        return None
    at: dict[str, At] = {count: _steps}
    shared = Shared(at, {}, count, _matters) if changing_state else Shared({}, at, count, _matters)
    return shared if _counts_suffice(shared, optimizer, history) else None


def _steps(steps: float, group: Group) -> float:
    return steps


class Moment:
    """A scratch parameter before a step: weights, the gradient to come, its state and its group."""

    def __init__(self, scratch: Optimizer, parameter: nn.Parameter, gradient: Tensor) -> None:
        state = scratch.state.get(parameter, {})
        self.state = copy.deepcopy(dict(state))
        self.shared = {key: entry for key, entry in self.state.items() if is_shared(key, entry, parameter)}
        self.group = {key: copy.deepcopy(one) for key, one in scratch.param_groups[0].items() if key != "params"}
        whole = {key: entry for key, entry in self.state.items() if key not in self.shared}
        self.before = Before(parameter.detach().clone(), gradient, whole)


def _history(optimizer: Optimizer, group: Group) -> Iterator[Moment]:
    """The moments before each of some steps, and after the last."""
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.randn(3, 2, generator=generator))
    settings = {key: one for key, one in group.items() if key not in _COUNTS}
    scratch = scratch_optimizer(optimizer, settings, parameter)
    for step in range(_NUM_STEPS):
        gradient = torch.randn(3, 2, generator=generator) + 1.0
        yield Moment(scratch, parameter, gradient)
        parameter.grad = gradient.clone()
        random.seed(step), np.random.seed(step), torch.manual_seed(step)
        own_step(type(optimizer))(scratch)
    yield Moment(scratch, parameter, gradient)


_COUNTS = ("step", "k", "weight_sum", "lr_max")


def _changing(moments: list[Mapping[str, Any]]) -> set[str]:
    """Which numbers change from step to step, once they are there."""
    later = moments[1:]
    return {key for key in later[-1] for a, b in itertools.pairwise(later) if not _equal(a.get(key), b[key])}


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


def _counts_suffice(shared: Shared, optimizer: Optimizer, history: list[Moment]) -> bool:
    for taken, (moment, after) in enumerate(itertools.pairwise(history[1:]), start=1):
        if float(shared.counted(moment.state, moment.group)) != taken:
            return False
        late = dict(history[-1].group)  # as a parameter that is older would have it
        late_state = {**moment.state, **history[-1].shared}
        weights, _ = stepped(shared, optimizer, late, late_state, moment.before, taken)
        if not torch.allclose(weights, after.before.weights, rtol=1e-6, atol=1e-7):
            return False
    return True


def _matters(ages: Ages, step: float, group: Group) -> Any:
    """Without a formula: as long as any of the decay rates remembers the birth, and for good where there is none."""
    betas = group.get("betas")
    if not isinstance(betas, (tuple, list)):
        return np.ones(len(ages), np.bool_)
    rates = np.array([float(beta) for beta in betas])[:, None]
    return np.asarray((np.maximum(ages, 1.0) * np.abs(rates) ** np.maximum(ages, 0.0) > 1e-7).any(axis=0))


# -- rows made fresh beside a fresh parameter ------------------------------------------------------------------------


def _excess(optimizer: Optimizer, group: Group, shared: Shared | None) -> float:
    """The larger of two ratios of mean updates, the first and the largest of 30, among rows 100 steps old."""
    cls, settings = type(optimizer), {key: one for key, one in group.items() if key not in _COUNTS}
    generator = torch.Generator().manual_seed(0)
    old, new = (nn.Parameter(torch.randn(3, 2, generator=generator)) for _ in range(2))
    scratch, fresh, learned = (scratch_optimizer(optimizer, settings, _copy(one)) for one in (old, new, new))
    _moves(scratch, 100)
    (used,), (pristine,) = scratch.param_groups[0]["params"], learned.param_groups[0]["params"]
    pristine.grad = torch.zeros(3, 2)
    own_step(cls)(learned)
    used.data.copy_(new.detach())
    rows = {key: entry for key, entry in learned.state[pristine].items() if not is_shared(key, entry, pristine)}
    for key, entry in rows.items():
        scratch.state[used][key].copy_(entry)
    if shared is None or not (shared.state or shared.group):
        moved = _moves(scratch, 30)
    else:
        moved = _replayed_moves(shared, optimizer, scratch, Before(new.detach().clone(), None, rows))
    expected = _moves(fresh, 30)
    return float(max(moved[0] / expected[0], moved.max() / expected.max()))


def _copy(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().clone())


def _moves(scratch: Optimizer, num_steps: int) -> Tensor:
    """The mean sizes of some updates under gradients that are alike, (num_steps,)."""
    (parameter,) = scratch.param_groups[0]["params"]
    sizes = []
    torch.manual_seed(0)  # for classes that draw in their step
    for gradient in _gradients(num_steps):
        before = parameter.detach().clone()
        parameter.grad = gradient
        own_step(type(scratch))(scratch)
        sizes.append((parameter.detach() - before).abs().mean())
    return torch.stack(sizes).clamp(min=torch.finfo(torch.float32).tiny)


def _replayed_moves(shared: Shared, optimizer: Optimizer, scratch: Optimizer, rows: Before) -> Tensor:
    """As `_moves`, of rows whose 30 steps are replayed."""
    (used,), group, sizes = scratch.param_groups[0]["params"], scratch.param_groups[0], []
    for age, gradient in enumerate(_gradients(30)):
        rows.gradient = gradient
        weights, after = stepped(shared, optimizer, group, scratch.state[used], rows, age)
        sizes.append((weights - rows.weights).abs().mean())
        rows = Before(weights, None, {key: after[key] for key in rows.state})
    return torch.stack(sizes)


def _gradients(num_steps: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(3, 2, generator=generator) + 1.0 for _ in range(num_steps))
