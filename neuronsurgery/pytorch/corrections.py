"""What is known of families of optimizers, and the step hooks that correct what age changes in their updates.

Adam divides its moments by `1 - beta ** step` (Kingma & Ba 2015, algorithm 1), which is wrong for a row younger than
its parameter: 3.2 times too large at first, 6.6 times at its peak. A pair of step hooks writes the young rows' update
anew, from the optimizer's own moments, with `age = step - birth` in the place of `step`, until the two corrections
agree. As the hooks stay for some 16,000 steps they are frugal: where the host knows the count of steps and all young
rows of a parameter are of one age, the corrections are two numbers and the update seven kernels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from torch.utils.hooks import RemovableHandle

from neuronsurgery.errors import OptimizerError
from neuronsurgery.pytorch import replaying
from neuronsurgery.pytorch.fresh_state import own_step
from neuronsurgery.pytorch.shared_entries import Group, count_of
from neuronsurgery.pytorch.step_hooks import install
from neuronsurgery.pytorch.transaction import Change
from neuronsurgery.pytorch.unit_axes import ROWS, UnitAxes
from neuronsurgery.pytorch.young import Young

__all__ = ["CORRECTIONS", "Corrections", "Family", "family_of", "has_young", "register"]


@dataclass(frozen=True)
class Family:
    """What is known of a class of optimizers.

    `correct(optimizer, parameter, group, young, sweep)` writes the young rows' update anew after a step and
    returns those that stay young. `ages`: the correction goes by age, so it needs births. `first_step`: there is no
    count of steps, and only the first update needs correcting.
    """

    correct: Callable[[Optimizer, nn.Parameter, Group, Young, bool], Young | None] | None = None
    ages: bool = False
    first_step: bool = False


def family_of(optimizer: Optimizer) -> Family | None:
    """Return the row of the class, or of the parent whose `step` it uses; None when the family is unknown."""
    cls = type(optimizer)
    known = next((ancestor for ancestor in cls.__mro__ if ancestor in _FAMILIES), None)
    return _FAMILIES[known] if known is not None and own_step(cls) is own_step(known) else None


# -- step hooks ------------------------------------------------------------------------------------------------------


class Corrections:
    """The pair of step hooks of one optimizer, and the young rows they correct.

    It refers to no optimizer, and to parameters only as long as the optimizer owns them.
    """

    has_pre_hook = True

    # Looking for rows that are no longer young makes the host wait for the device: not at every step.
    SWEEP_EVERY = 64

    def __init__(self) -> None:
        self.young: dict[nn.Parameter, Young] = {}
        self.due: list[tuple[nn.Parameter, Group]] = []
        self.num_steps = 0

    def install(self, optimizer: Optimizer) -> Iterable[RemovableHandle]:
        yield optimizer.register_step_pre_hook(torch.compiler.disable(self.before_step))  # type: ignore[no-untyped-call]
        yield optimizer.register_step_post_hook(torch.compiler.disable(self.after_step))  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        self.due = []
        if not self.young:
            return None
        family, young_now = family_of(optimizer), {}
        for parameter, group in self._owned(optimizer):
            young = _young_now(optimizer, parameter, group, self.young[parameter])
            if young is None:
                continue
            young_now[parameter] = young
            self.due.append((parameter, group))
            if family is None:
                replaying.remember(optimizer, parameter, young)
            else:
                rows = young.select(parameter)
                young.weights = rows.clone() if young.is_all else rows
        self.young = young_now
        return _watching_closure(young_now, args, kwargs) if family is None else None

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        due, self.due = self.due, []
        family = family_of(optimizer) if due else None
        correct = replaying.replay if family is None else family.correct
        self.num_steps += 1
        sweep = self.num_steps % self.SWEEP_EVERY == 0
        for parameter, group in due:
            young = self.young.get(parameter)
            if young is None or young.weights is None or correct is None:
                continue  # no snapshot: overwritten during this step, by another hook, so the step was not theirs
            remaining = correct(optimizer, parameter, group, young, sweep)
            if remaining is None:
                del self.young[parameter]
            else:
                self.young[parameter] = remaining
                remaining.forget_step()

    def _owned(self, optimizer: Optimizer) -> Iterator[tuple[nn.Parameter, Group]]:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in self.young:
                    yield parameter, group


def _young_now(optimizer: Optimizer, parameter: nn.Parameter, group: Group, young: Young) -> Young | None:
    """Return the rows that are still young before a step, with the count of steps in `step`; None when none are.

    A function of births, count and settings, wherever the host knows the count; see `_is_due` for where it does not.
    """
    family = family_of(optimizer)
    if family is None:
        step: float | Tensor | None = count_of(optimizer, parameter, group)
    else:
        step = _count(optimizer.state.get(parameter, {}).get("step", 0.0), young.births)
    if (family is None or family.ages) and isinstance(step, float):
        if young.latest > step:  # later births belong to a state that was replaced
            young = young.staying(parameter, young.births <= step, step)
        if family is None:
            still = replaying.without_grown_up(optimizer, parameter, group, young, step)
        else:
            still = _without_grown_up(parameter, young, group, step)
        if still is None:
            return None
        young = still
    young.step = step
    return young


def _watching_closure(young: dict[nn.Parameter, Young], args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    """Let a closure that computes gradients leave those of the young rows; some classes write into theirs."""
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if not callable(closure):
        return None

    def watched() -> Any:
        loss = closure()
        for parameter, one in young.items():
            if one.weights is not None and parameter.grad is not None:
                one.gradient = one.axes.take(parameter.grad, one.rows)
        return loss

    return (args, {**kwargs, "closure": watched}) if "closure" in kwargs else ((args[0], watched, *args[2:]), kwargs)


CORRECTIONS: WeakKeyDictionary[Optimizer, Corrections] = WeakKeyDictionary()


def register(
    optimizer: Optimizer, parameter: nn.Parameter, rows: Tensor, steps: Sequence[int], axes: UnitAxes = ROWS
) -> list[Change]:
    """Plan the changes that enter rows among the young of an optimizer, born at `steps`, with the hooks they need.

    `rows`: (r,) int64, units under `axes`; `steps`: r values of the optimizer's own count. Births replace earlier ones
    of the same rows. Raises `OptimizerError` where the parameter has young rows under other axes.
    """
    assert rows.numel() == len(steps), "one birth for each row"
    _refuse_other_axes(optimizer, parameter, axes)
    births = torch.tensor(steps, dtype=_dtype_of_births(parameter), device=parameter.device)
    enter = _Enter(optimizer, parameter, rows.to(parameter.device), births, max(steps, default=0), axes)
    return [*install(optimizer, CORRECTIONS, Corrections), enter]


def has_young(optimizer: Optimizer, parameter: nn.Parameter, group: Group, births: Sequence[int]) -> bool:
    """Whether the next step would correct any of the rows born at these counts of the optimizer's, if it had hooks."""
    rows, born = torch.arange(len(births)), torch.tensor(births, dtype=_dtype_of_births(parameter))
    young = Young.of(parameter, rows.to(parameter.device), born.to(parameter.device), max(births), ROWS)
    if not len(young.rows):
        return False
    still = _young_now(optimizer, parameter, group, young)
    return still is not None and bool(len(still.rows))


def _dtype_of_births(parameter: Tensor) -> torch.dtype:
    return torch.float64 if parameter.dtype in (torch.float64, torch.complex128) else torch.float32


def _refuse_other_axes(optimizer: Optimizer, parameter: nn.Parameter, axes: UnitAxes) -> None:
    """Refuse to number the units of a parameter in two ways: their rows would overlap."""
    young = CORRECTIONS[optimizer].young.get(parameter) if optimizer in CORRECTIONS else None
    if young is not None and young.axes != axes:
        raise OptimizerError(
            f"the units of a parameter of shape {tuple(parameter.shape)} were asked to be along {axes}, but an earlier "
            f"operation with this {type(optimizer).__name__} found them along {young.axes}, and those are still young. "
            "Operate on the parameter in one role, or build the optimizer anew"
        )


class _Enter:
    """Enter rows of a parameter among the young of an optimizer that has the hooks."""

    def __init__(
        self,
        optimizer: Optimizer,
        parameter: nn.Parameter,
        rows: Tensor,
        births: Tensor,
        latest: float,
        axes: UnitAxes,
    ) -> None:
        self.optimizer, self.parameter = optimizer, parameter
        self.rows, self.births, self.latest, self.axes = rows, births, latest, axes
        self.replaced: dict[nn.Parameter, Young] | None = None  # None until the rows are about to be entered

    def apply(self) -> None:
        young = CORRECTIONS[self.optimizer].young
        self.replaced = dict(young)
        young[self.parameter] = self._joined(young.get(self.parameter))

    def revert(self) -> None:
        corrections = CORRECTIONS.get(self.optimizer)
        if corrections is not None and self.replaced is not None:
            corrections.young = self.replaced

    def _joined(self, young: Young | None) -> Young:
        if young is None:
            return Young.of(self.parameter, self.rows, self.births, self.latest, self.axes)
        assert young.axes == self.axes, "one operation numbers the units of a parameter in one way"
        stays = ~torch.isin(young.rows, self.rows)
        rows = torch.cat([young.rows[stays], self.rows])
        births = torch.cat([young.births[stays], self.births])
        return Young.of(self.parameter, rows, births, max(self.latest, young.latest), self.axes)


# -- what is corrected -----------------------------------------------------------------------------------------------


def _correct_dampening(
    optimizer: Optimizer, parameter: nn.Parameter, group: Group, young: Young, sweep: bool
) -> Young | None:
    """SGD's first gradient enters the buffer undamped, later ones times `1 - dampening`: undo that once.

    With a dampening of 1 the row's buffer holds no trace of the gradient; it stays 0. A first step that the
    fused kernel skips for an overflow counts as the first.
    """
    buffer = optimizer.state.get(parameter, {}).get("momentum_buffer")
    if parameter.grad is None:
        return young
    if buffer is not None and group["momentum"] and group["dampening"] != 1:
        assert young.weights is not None, "the step hooks come in pairs"
        first = young.select(buffer) / (1 - group["dampening"])
        young.write(buffer, first)
        young.write(parameter, young.weights - _on(group["lr"], parameter) * first)
    return None


def _correct_bias(
    optimizer: Optimizer,
    parameter: nn.Parameter,
    group: Group,
    young: Young,
    sweep: bool,
    *,
    is_decoupled: bool = False,
) -> Young | None:
    """Write the update of Adam's young rows anew, with the bias corrections at their ages.

    A step that did not count (no gradient, an overflow found by a gradient scaler) changes nothing.
    With a `step` on the device that is masked, not branched on, which would make the host wait.
    """
    state = optimizer.state.get(parameter, {})
    if "step" not in state:
        return young
    step = _count(state["step"], young.births)
    is_due = _is_due(young, step, group)
    if is_due is not False:
        square = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
        is_decoupled = group.get("decoupled_weight_decay", is_decoupled)
        moved = _adam_update(group, young, step, state["exp_avg"], square, is_decoupled=is_decoupled)
        if isinstance(is_due, Tensor):
            moved = torch.where(young.over(is_due, moved), moved.to(parameter), young.select(parameter))
        young.write(parameter, moved)
    return _still_young(parameter, young, group, step) if sweep and isinstance(step, Tensor) else young


def _is_due(young: Young, step: float | Tensor, group: Group) -> bool | Tensor:
    """Whether the step counted; on the device for each row, (r,), and not for those that have grown up.

    Nor for those born after the step before: they belong to a state that was replaced, and their births become NaN,
    so that they never fall due.
    """
    assert young.step is not None, "the step hooks come in pairs"
    counted = step - young.step == 1
    if isinstance(counted, bool):
        return counted
    young.births.masked_fill_(young.births > young.step, torch.nan)
    ages = step - young.births
    return (ages >= 1) & (ages < _grown_up_at(group, young)) & counted


def _adam_update(
    group: Group, young: Young, step: float | Tensor, moment: Tensor, square: Tensor, *, is_decoupled: bool
) -> Tensor:
    """Return `w (1 - lr wd) - lr m_hat / (sqrt(v_hat) + eps)`, as the snapshot, its decay only where it is decoupled.

    `moment`, `square`: the parameter's. Kingma & Ba 2015, algorithm 1, with both corrections moved into the rate and
    eps as their section 2 has it; Loshchilov & Hutter 2019, algorithm 2, with the schedule multiplier in `lr` and decay
    times `lr`, as torch has it. Complex numbers count as pairs. Computes in the young rows' snapshot.
    """
    assert young.weights is not None, "the step hooks come in pairs"
    weights, moment, square = young.weights, young.select(moment), young.select(square)
    is_complex, dtype = weights.is_complex(), young.births.dtype
    if is_complex:
        weights, moment, square = (torch.view_as_real(entry) for entry in (weights, moment, square))
    if weights.dtype is not dtype:
        weights, moment, square = (entry.to(dtype) for entry in (weights, moment, square))
    if is_decoupled:
        weights.mul_(1 - _on(group["lr"], weights) * _on(group["weight_decay"], weights))
    rate, eps = _rate_and_eps(group, young, step)
    if isinstance(rate, Tensor):
        moment, rate, eps = moment * young.over(rate, weights), 1.0, young.over(eps, weights)
    weights.addcdiv_(moment, square.sqrt().add_(eps), value=-rate)
    return torch.view_as_complex(weights) if is_complex else weights


def _rate_and_eps(group: Group, young: Young, step: float | Tensor) -> tuple[Any, Any]:
    """Return `lr sqrt(1 - beta_2^age) / (1 - beta_1^age)` and `eps sqrt(1 - beta_2^age)`: two numbers, or two (r,).

    What the host can compute it does, in float64: on a few numbers torch's overhead is all there is.
    """
    lr, (beta, beta_square) = group["lr"], group["betas"]
    if isinstance(lr, Tensor) or isinstance(beta, Tensor):
        lr, beta, beta_square = (_on(setting, young.births) for setting in (lr, beta, beta_square))
    is_on_host = not any(isinstance(one, Tensor) for one in (step, lr, beta, beta_square))
    ages = step - (young.host_births if is_on_host else young.births)
    root = _bias(beta_square, ages) ** 0.5
    rate, eps = lr * root / _bias(beta, ages), group["eps"] * root
    if isinstance(rate, np.ndarray):
        return torch.from_numpy(rate).to(young.births), torch.from_numpy(eps).to(young.births)
    return rate, eps


def _without_grown_up(parameter: nn.Parameter, young: Young, group: Group, step: float) -> Young | None:
    """Return the rows that the step after `step` corrects; None when there are none."""
    last = step + 1 - _grown_up_at(group, young)
    if float(np.min(young.host_births, initial=math.inf)) > last:
        return young
    return young.staying(parameter, young.births > last, young.latest) if young.latest > last else None


def _still_young(parameter: nn.Parameter, young: Young, group: Group, step: Tensor) -> Young | None:
    """The same where the device has the count, for which the host waits; also without those that were forgotten."""
    stays = (young.births > step + 1 - _grown_up_at(group, young)) & ~young.births.isnan()
    if bool(stays.all()):
        return young
    return young.staying(parameter, stays, young.latest) if bool(stays.any()) else None


def _grown_up_at(group: Group, young: Young) -> float:
    """Return the age from which a row's bias corrections are 1 to rounding, so that it needs no correction any more.

    It goes by the betas alone, so that a row is corrected in the same steps whether or not the hooks, or the process,
    have been there all along.
    """
    tolerance = 1e-15 if young.births.dtype is torch.float64 else 1e-7
    betas = [float(beta) for beta in group["betas"]]
    return max(math.log(tolerance) / math.log(beta) if beta > 0 else 1.0 for beta in betas)


def _bias(beta: float | Tensor, ages: Any) -> Any:
    """Return `1 - beta ** age` without cancellation, for ages that are a number, an array or a tensor."""
    if isinstance(beta, Tensor):
        return -torch.expm1(ages * beta.log())
    exponents = ages * (math.log(beta) if beta > 0 else -math.inf)
    return -(torch if isinstance(exponents, Tensor) else np).expm1(exponents)


def _count(step: float | Tensor, like: Tensor) -> float | Tensor:
    """Return a step count the host can read without waiting as a number, any other as a copy, 0-d, on the device."""
    if isinstance(step, Tensor) and step.device.type != "cpu":
        return step.to(like, copy=True).reshape(())
    return float(step)


def _on(scalar: Any, like: Tensor) -> Any:
    """Return a hyper-parameter as it can be combined with `like`: a number where the host can read it, or 0-d."""
    if isinstance(scalar, Tensor) and scalar.device.type != "cpu":
        return scalar.detach().to(like).reshape(())
    return float(scalar.detach()) if isinstance(scalar, Tensor) else float(scalar)


# A new family is a new row. No bias correction, no note: the scratch state is all that RMSprop needs.
_FAMILIES: dict[type[Optimizer], Family] = {
    SGD: Family(_correct_dampening, first_step=True),
    Adam: Family(_correct_bias, ages=True),
    AdamW: Family(functools.partial(_correct_bias, is_decoupled=True), ages=True),
    RMSprop: Family(),
}
