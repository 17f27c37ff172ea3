"""What is known of families of optimizers: which numbers their updates go by, and which rows they couple.

A new family is a new row. A class that is not here is tried out (`trials`): where a count of steps is all that its
rows share, it is treated as the families that are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
)

from neuronsurgery.pytorch.corrections import Family, correct_bias, correct_by_replay, correct_dampening
from neuronsurgery.pytorch.fresh_state import Group, own_step
from neuronsurgery.pytorch.replaying import Ages, Shared
from neuronsurgery.pytorch.trials import Trial, tried_out

__all__ = ["family_of", "is_known", "trial_of"]

Mask = NDArray[np.bool_]


def family_of(optimizer: Optimizer) -> Family | None:
    """Return what is known of an optimizer's class, or of the parent whose `step` it uses, or what a trial shows.

    None when nothing is known: it has no state yet to try it with, or shares what cannot be told from a count.
    """
    known = _known(type(optimizer))
    if known is not None:
        return known
    trial = trial_of(optimizer)
    return None if trial is None else _tried_family(trial.shared)


def is_known(optimizer: Optimizer) -> bool:
    """Whether the class, or the parent whose `step` it uses, is in the table."""
    return _known(type(optimizer)) is not None


def _known(cls: type[Optimizer]) -> Family | None:
    parent = next((ancestor for ancestor in cls.__mro__ if ancestor in _FAMILIES), None)
    if parent is not None and own_step(cls) is own_step(parent):
        return _FAMILIES[parent]
    return _BY_NAME.get((cls.__module__.partition(".")[0], cls.__name__))


def trial_of(optimizer: Optimizer) -> Trial | None:
    """What a trial of the class with the optimizer's settings showed; None as long as it has no state."""
    if optimizer not in _TRIED:
        owned = (group for group in optimizer.param_groups for one in group["params"] if optimizer.state.get(one))
        group = next(owned, None)
        if group is None:
            return None
        _TRIED[optimizer] = tried_out(optimizer, group)
    return _TRIED[optimizer]


_TRIED: WeakKeyDictionary[Optimizer, Trial] = WeakKeyDictionary()


@functools.cache
def _tried_family(shared: Shared | None) -> Family | None:
    if shared is None:
        return None
    return _replayed(shared) if shared.state or shared.group else Family()


# -- shared numbers, and for how long they differ --------------------------------------------------------------------

_TOLERANCE = 1e-7


def _steps(steps: float, group: Group) -> float:
    return steps


def _betas_matter(ages: Ages, step: float, group: Group) -> Mask:
    """Whether the bias corrections differ, and what is multiplied by the count as RAdam's rectification is."""
    betas = np.array([float(beta) for beta in group["betas"]])[:, None]
    with np.errstate(under="ignore"):
        return np.asarray((np.maximum(ages, 1.0) * betas ** np.maximum(ages, 0.0) > _TOLERANCE).any(axis=0))


def _momentum(step: float | NDArray[np.float64], group: Group) -> NDArray[np.float64]:
    """NAdam's momentum at a step: `beta_1 (1 - 0.96^(step psi) / 2)` (Dozat 2016, section 3.1)."""
    return np.asarray(float(group["betas"][0]) * (1 - 0.5 * 0.96 ** (step * group["momentum_decay"])))


def _momentum_product(steps: float, group: Group) -> float:
    return float(_momentum(np.arange(1.0, min(steps, 100_000.0) + 1), group).prod())


def _nadam_matters(ages: Ages, step: float, group: Group) -> Mask:
    apart = np.abs(_momentum(ages, group) - _momentum(step, group)) > _TOLERANCE
    return np.asarray(_betas_matter(ages, step, group) | apart)


def _averaged_rate(steps: float, group: Group) -> float:
    """ASGD's rate for the step after so many: `lr / (1 + lambda lr steps)^alpha`."""
    lr = float(group["lr"])
    return float(lr / (1 + group["lambd"] * lr * steps) ** group["alpha"])


def _averaging_weight(steps: float, group: Group) -> float:
    return 1 / max(1.0, steps - float(group["t0"]))


def _asgd_matters(ages: Ages, step: float, group: Group) -> Mask:
    rates = np.array([_averaged_rate(age, group) for age in ages]) / _averaged_rate(step, group)
    return np.asarray((rates - 1 > _TOLERANCE) | (step > group["t0"]))


def _adagrad_matters(ages: Ages, step: float, group: Group) -> Mask:
    rates = (1 + step * group["lr_decay"]) / (1 + ages * group["lr_decay"])
    return np.asarray(rates - 1 > _TOLERANCE)


def _free_rates(steps: float, group: Group) -> NDArray[np.float64]:
    """The rate of each step so far, warmed up or rectified, with lr as it is now."""
    k = np.arange(1.0, steps + 1)
    if "silent_sgd_phase" in group:
        return np.asarray(float(group["lr"]) * _rectified(k, float(group["betas"][1]), bool(group["silent_sgd_phase"])))
    return np.asarray(float(group["lr"]) * np.minimum(1.0, k / max(1, group["warmup_steps"])))


def _rectified(steps: NDArray[np.float64], beta: float, is_silent: bool) -> NDArray[np.float64]:
    """RAdam's rectification of each step (Liu et al. 2020, algorithm 2)."""
    longest, power = 2.0 / (1.0 - beta) - 1.0, beta**steps
    length = longest - 2.0 * steps * power / (1.0 - power)
    safe = np.where(length > 4.0, length, 5.0)
    ratio = (safe - 4.0) * (safe - 2.0) * longest / ((longest - 4.0) * (longest - 2.0) * safe)
    return np.where(length > 4.0, np.sqrt(ratio), float(not is_silent))


def _free_largest_rate(steps: float, group: Group) -> float:
    return float(_free_rates(steps, group).max()) if steps else -1.0


def _free_sum(steps: float, group: Group) -> float:
    """The sum of the weights of schedule-free averages (Defazio et al. 2024, algorithm 1)."""
    largest = np.maximum.accumulate(_free_rates(steps, group))
    return float((np.arange(1.0, steps + 1) ** group["r"] * largest ** group["weight_lr_power"]).sum())


# -- the table -------------------------------------------------------------------------------------------------------


def _replayed(shared: Shared) -> Family:
    return Family(functools.partial(correct_by_replay, shared=shared), ages=True, shared=shared)


def _counting(matters: Callable[[Ages, float, Group], Mask]) -> Family:
    return _replayed(Shared({"step": _steps}, matters=matters))


def _schedule_free(count: str) -> Family:
    return _replayed(Shared(group={count: _steps, "lr_max": _free_largest_rate, "weight_sum": _free_sum}, count=count))


_SCHEDULE_FREE, _ANOTHER_SCHEDULE_FREE = _schedule_free("k"), _schedule_free("step")

# No correction, no note: what they learn on a scratch parameter is all that Adadelta, RMSprop and Rprop need.
_FAMILIES: dict[type[Optimizer], Family] = {
    SGD: Family(correct_dampening, first_step=True),
    Adam: Family(correct_bias, ages=True),
    AdamW: Family(functools.partial(correct_bias, is_decoupled=True), ages=True),
    NAdam: _replayed(Shared({"step": _steps, "mu_product": _momentum_product}, matters=_nadam_matters)),
    RAdam: _counting(_betas_matter),
    Adamax: _counting(_betas_matter),
    Adagrad: _counting(_adagrad_matters),
    ASGD: _replayed(Shared({"step": _steps, "eta": _averaged_rate, "mu": _averaging_weight}, matters=_asgd_matters)),
    Adadelta: Family(),
    RMSprop: Family(),
    Rprop: Family(),
}

# Classes that older versions of torch do not have, or that other packages define.
_BY_NAME: dict[tuple[str, str], Family] = {
    ("torch", "Muon"): Family(coupling="orthogonalizes the update of the whole parameter"),
    ("torch", "Adafactor"): Family(
        coupling="factors the second moments of the whole parameter, and clips and scales its update as one",
        means=("row_var", "variance"),
    ),
    ("schedulefree", "AdamWScheduleFree"): _SCHEDULE_FREE,
    ("schedulefree", "SGDScheduleFree"): _SCHEDULE_FREE,
    ("schedulefree", "RAdamScheduleFree"): _SCHEDULE_FREE,
    ("pytorch_optimizer", "ScheduleFreeAdamW"): _ANOTHER_SCHEDULE_FREE,
    ("pytorch_optimizer", "ScheduleFreeSGD"): _ANOTHER_SCHEDULE_FREE,
}
