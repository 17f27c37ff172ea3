"""The step hooks that correct what age changes in the updates of young rows, by formula or by replay.

Adam divides its moments by `1 - beta ** step` (Kingma & Ba 2015, algorithm 1), which is wrong for a row younger than
its parameter: 3.2 times too large at first, 6.6 times at its peak. A pair of step hooks writes the young rows' update
anew, from the optimizer's own moments, with `age = step - birth` in the place of `step`, until the two corrections
agree. As the hooks stay for some 16,000 steps they are frugal: where the host knows the count of steps and all young
rows of a parameter are of one age, the corrections are two numbers and the update seven kernels. Optimizers that share
other numbers have the steps of their young rows replayed (`replaying`), which is dearer and serves them all.
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
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from neuronsurgery.pytorch.fresh_state import Group
from neuronsurgery.pytorch.replaying import Before, Shared, replay
from neuronsurgery.pytorch.sharding import held, is_sharded, own_rows
from neuronsurgery.pytorch.step_hooks import install
from neuronsurgery.pytorch.transaction import Change
from neuronsurgery.pytorch.unit_axes import ROWS, UnitAxes

__all__ = [
    "CORRECTIONS",
    "Corrections",
    "Family",
    "Young",
    "correct_bias",
    "correct_dampening",
    "correct_by_replay",
    "register",
]


@dataclass(frozen=True)
class Family:
    """What is known of a class of optimizers.

    `correct(optimizer, parameter, group, young, sweep)` writes the young rows' update anew after a step and
    returns those that stay young. `ages`: the correction goes by age, so it needs births. `first_step`: there is no
    count of steps, and only the first update needs correcting. `shared`: the numbers that all rows of a parameter
    share, for classes whose steps are replayed. `coupling`: how the update of one row depends on the others, "" where
    it does not; `means` are entries of their state of which fresh rows take the mean of the other rows.
    """

    correct: Callable[[Optimizer, nn.Parameter, Group, Young, bool], Young | None] | None = None
    ages: bool = False
    first_step: bool = False
    shared: Shared | None = None
    coupling: str = ""
    means: tuple[str, ...] = ()

    def counted(self, optimizer: Optimizer, parameter: nn.Parameter, group: Group) -> Any:
        """The count of steps that the optimizer took for a parameter, 0 before the first; a number or 0-d."""
        state = optimizer.state.get(parameter, {})
        return state.get("step", 0.0) if self.shared is None else self.shared.counted(state, group)

    def still_young(self, births: Tensor, step: float | Tensor, group: Group) -> Tensor:
        """For births, (r,), whether what goes by age still differs from what goes by `step`; (r,) bool."""
        if self.shared is None:
            return _biases_differ(births, step, group)
        ages = np.maximum(float(step) - births.double().cpu().numpy(), 0.0)
        return torch.from_numpy(self.shared.matters(ages, float(step), group)).to(births.device)

    def young_now(self, births: Tensor, step: float, group: Group) -> Tensor:
        """Of rows born then, (r,), which the sweeps up to `step` have left among the young; (r,) bool."""
        swept = int(step) // Corrections.SWEEP_EVERY * Corrections.SWEEP_EVERY
        return (births >= swept) | self.still_young(births, float(swept), group)


@dataclass
class Young:
    """The young rows of one parameter, on its device; `weights` and `step` are as they were before the step.

    `rows`: (r,) int64, ascending, units under `axes`; `index`: the same as `axes.index` has it; `births`: (r,) float,
    NaN for a row to be forgotten, none after `latest`; `host_births`: the same as numbers of the host, just one where
    all rows have the same; `shape`: (r,), or what `axes.unit_shape` says where these are all rows of the parameter
    (`is_all`), so that they are seen in place; `weights`: (*shape, *row_shape); `step`: 0-d when on the device;
    `before`: what a replay starts from.
    """

    rows: Tensor
    axes: UnitAxes
    index: tuple[Tensor, ...]
    births: Tensor
    latest: float
    host_births: float | NDArray[np.float64]
    is_all: bool
    shape: tuple[int, ...]
    weights: Tensor | None = None
    step: float | Tensor | None = None
    before: Before | None = None

    @staticmethod
    def of(parameter: Tensor, rows: Tensor, births: Tensor, latest: float, axes: UnitAxes) -> Young:
        """Those that are young, born after 0 and not forgotten; it waits for the device."""
        is_young = births > 0
        rows, order = rows[is_young].sort()
        births = births[is_young][order]
        on_host = births.cpu().numpy().astype(np.float64)
        is_common = len(on_host) > 0 and bool((on_host == on_host[0]).all())
        host_births = float(on_host[0]) if is_common else on_host
        is_all = len(rows) == axes.num_units(parameter.shape)
        shape = axes.unit_shape(parameter.shape) if is_all else (len(rows),)
        return Young(rows, axes, axes.index(parameter.shape, rows), births, latest, host_births, is_all, shape)

    def staying(self, parameter: Tensor, stays: Tensor, latest: float) -> Young:
        """Those of the rows for which `stays`, (r,) bool, says so."""
        return Young.of(held(parameter), self.rows[stays], self.births[stays], latest, self.axes)

    def select(self, tensor: Tensor) -> Tensor:
        """The rows of a tensor of the parameter's shape, (*shape, *row_shape), to be read only and under `no_grad`."""
        view = self.axes.view(held(tensor))
        if self.is_all:
            return view
        return view.index_select(0, self.rows) if len(self.index) == 1 else view[self.index]

    def write(self, tensor: Tensor, values: Tensor) -> None:
        """Overwrite the rows of such a tensor."""
        tensor = held(tensor)
        view = self.axes.view(tensor)
        if self.is_all:
            view.copy_(values)
        elif len(self.index) == 1:
            view.index_copy_(0, self.rows, values.to(tensor))
        else:
            view.index_put_(self.index, values.to(tensor))

    def over(self, column: Tensor, like: Tensor) -> Tensor:
        """Shape one value per row, (r,), to apply to all of `like`, (*shape, ...)."""
        return column.view(*self.shape, *[1] * (like.dim() - len(self.shape)))


# -- step hooks ------------------------------------------------------------------------------------------------------


class Corrections:
    """The pair of step hooks of one optimizer, and the young rows they correct.

    It refers to no optimizer, and to parameters only as long as the optimizer owns them.
    """

    has_pre_hook = True

    # Looking for rows that are no longer young makes the host wait for the device: not at every step. The count of
    # the parameter says when, so that a run that was resumed forgets the same rows at the same step.
    SWEEP_EVERY = 64

    def __init__(self, family: Family) -> None:
        self.family = family
        self.young: dict[nn.Parameter, Young] = {}
        self.due: list[tuple[nn.Parameter, Group]] = []
        self.num_steps = 0

    def install(self, optimizer: Optimizer) -> Iterable[RemovableHandle]:
        yield optimizer.register_step_pre_hook(torch.compiler.disable(self.before_step))  # type: ignore[no-untyped-call]
        yield optimizer.register_step_post_hook(torch.compiler.disable(self.after_step))  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if not self.young:
            return None
        self.due = list(self._owned(optimizer))
        self.young = {parameter: self.young[parameter] for parameter, _ in self.due}
        for parameter, group in self.due:
            young = self.young[parameter]
            if not len(young.rows):  # of a sharded parameter, others hold the rows
                continue
            step = _count(self.family.counted(optimizer, parameter, group), young.births)
            if self.family.ages and isinstance(step, float) and young.latest > step:
                # Later births belong to a state that was replaced.
                young = self.young[parameter] = young.staying(parameter, young.births <= step, step)
            young.step = step
            if self.family.shared is not None:
                young.before = Before.of(optimizer, parameter, young)
            else:
                rows = young.select(parameter)
                young.weights = rows.clone() if young.is_all else rows
        return None if self.family.shared is None else self._watching_closure(optimizer, args, kwargs)

    def _watching_closure(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Let a closure that computes gradients leave those of the young rows: some classes write into theirs."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            return None

        def watched() -> Any:
            loss = closure()
            with torch.no_grad():
                for parameter, young in self.young.items():
                    if young.before is not None:
                        young.before.take_gradient(optimizer, parameter, young)
            return loss

        return (
            (args, {**kwargs, "closure": watched}) if "closure" in kwargs else ((args[0], watched, *args[2:]), kwargs)
        )

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        due, self.due = self.due, []
        if self.family.correct is None:
            return
        self.num_steps += 1
        for parameter, group in due:
            young = self.young.get(parameter)
            if young is None or (young.weights is None and young.before is None):
                continue  # no snapshot: overwritten during this step, by another hook, so the step was not theirs
            remaining = self.family.correct(optimizer, parameter, group, young, self._sweeps(young))
            if remaining is None:
                del self.young[parameter]
            else:
                self.young[parameter] = remaining
                remaining.weights = remaining.step = remaining.before = None

    def _sweeps(self, young: Young) -> bool:
        taken = self.num_steps if isinstance(young.step, Tensor) or young.step is None else int(young.step) + 1
        return taken % self.SWEEP_EVERY == 0

    def _owned(self, optimizer: Optimizer) -> Iterator[tuple[nn.Parameter, Group]]:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in self.young:
                    yield parameter, group


CORRECTIONS: WeakKeyDictionary[Optimizer, Corrections] = WeakKeyDictionary()


def register(
    optimizer: Optimizer,
    family: Family,
    parameter: nn.Parameter,
    rows: Tensor,
    steps: Sequence[int],
    axes: UnitAxes = ROWS,
) -> list[Change]:
    """Plan the changes that enter rows among the young of an optimizer, born at `steps`, with the hooks they need.

    `rows`: (r,) int64, units under `axes`; `steps`: r values of the optimizer's own count. Births replace earlier ones
    of the same weights. Where a parameter's young rows are numbered in another way already (a layer's rows are its own
    units, its columns those of the layer before), its weights are numbered one by one from then on.
    """
    assert rows.numel() == len(steps), "one birth for each row"
    dtype = torch.float64 if parameter.dtype in (torch.float64, torch.complex128) else torch.float32
    births = torch.tensor(steps, dtype=dtype, device=parameter.device)
    rows = rows.to(parameter.device)
    if is_sharded(parameter):
        which, rows = own_rows(parameter, rows, axes)
        births = births[which]
    enter = _Enter(optimizer, parameter, rows, births, max(steps, default=0), axes)
    return [*install(optimizer, CORRECTIONS, functools.partial(Corrections, family)), enter]


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
        parameter = held(self.parameter)
        if young is None:
            return Young.of(parameter, self.rows, self.births, self.latest, self.axes)
        (rows, births), (old, born), axes = (self.rows, self.births), (young.rows, young.births), self.axes
        if young.axes != axes:
            shape = parameter.shape
            rows, births = _by_weight(axes, shape, rows, births)
            old, born = _by_weight(young.axes, shape, old, born)
            axes = UnitAxes(tuple(range(len(shape))))
        stays = ~torch.isin(old, rows)
        together = torch.cat([old[stays], rows]), torch.cat([born[stays], births])
        return Young.of(parameter, *together, max(self.latest, young.latest), axes)


def _by_weight(axes: UnitAxes, shape: torch.Size, rows: Tensor, births: Tensor) -> tuple[Tensor, Tensor]:
    """The single weights of rows, (r * row_numel,), as places in the flat tensor, and their births."""
    weights = axes.elements(shape, rows)
    return weights.flatten(), births.repeat_interleave(weights.shape[1])


# -- what is corrected -----------------------------------------------------------------------------------------------


def correct_dampening(
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


def correct_bias(
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
    is_due = _is_due(young, step)
    if is_due is not False:
        square = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
        is_decoupled = group.get("decoupled_weight_decay", is_decoupled)
        moved = _adam_update(group, young, step, state["exp_avg"], square, is_decoupled=is_decoupled)
        if isinstance(is_due, Tensor):
            moved = torch.where(young.over(is_due, moved), moved.to(held(parameter)), young.select(parameter))
        young.write(parameter, moved)
    return _still_young(parameter, young, group, step) if sweep and is_due is not False else young


def correct_by_replay(
    optimizer: Optimizer, parameter: nn.Parameter, group: Group, young: Young, sweep: bool, *, shared: Shared
) -> Young | None:
    """Take the young rows' step anew, as rows of their age."""
    assert young.before is not None, "the step hooks come in pairs"
    is_due = replay(shared, optimizer, parameter, group, young, young.before)
    if not (is_due and sweep):
        return young
    step = float(shared.counted(optimizer.state.get(parameter, {}), group))
    ages = step - young.births.double().cpu().numpy()
    return _staying(parameter, young, torch.from_numpy(shared.matters(ages, step, group)).to(young.births.device))


def _is_due(young: Young, step: float | Tensor) -> bool | Tensor:
    """Whether the step counted; on the device for each row, (r,), and not for those born after the step before.

    Those belong to a state that was replaced: their births become NaN, so that they never fall due.
    """
    assert young.step is not None, "the step hooks come in pairs"
    counted = step - young.step == 1
    if isinstance(counted, bool):
        return counted
    young.births.masked_fill_(young.births > young.step, torch.nan)
    return (step - young.births >= 1) & counted


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


def _still_young(parameter: nn.Parameter, young: Young, group: Group, step: float | Tensor) -> Young | None:
    """Return the rows whose corrections still differ from their parameter's; None when there are none."""
    stays = _biases_differ(young.births, step, group) & ~young.births.isnan()
    return _staying(parameter, young, stays)


def _staying(parameter: nn.Parameter, young: Young, stays: Tensor) -> Young | None:
    if bool(stays.all()):
        return young
    if not bool(stays.any()):
        return None
    return young.staying(parameter, stays, young.latest)


def _biases_differ(births: Tensor, step: float | Tensor, group: Group) -> Tensor:
    """For rows born then, (r,), whether the corrections at their ages differ from those at `step`; (r,) bool."""
    tolerance = 1e-15 if births.dtype is torch.float64 else 1e-7
    ages, full_ages = step - births, step - torch.zeros_like(births)
    betas = [_on(beta, births) for beta in group["betas"]]
    differ = torch.stack([1 - _bias(beta, ages) / _bias(beta, full_ages) > tolerance for beta in betas])
    return differ.any(dim=0)


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
