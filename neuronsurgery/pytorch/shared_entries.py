"""What all rows of a parameter share in an optimizer's memory, and what it is after a number of steps.

Counts of steps, and numbers that follow from the count and the settings alone, in the state of a parameter (`step`,
NAdam's `mu_product`, ASGD's `eta` and `mu`) or in its group (schedule-free's `k`, `weight_sum`, `lr_max`). A row
younger than its parameter would need other values. They are told by name; whether a class means the same by a name is
tried before a row goes by it (`replaying`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["STATE_RULES", "Group", "count_of", "group_rules", "number"]

Group = dict[str, Any]

Rule = Callable[[Group, int], float]
"""(the parameter's group, how many steps were taken) -> the entry's value."""


def count_of(optimizer: Optimizer, parameter: nn.Parameter, group: Group) -> float | None:
    """Return the optimizer's count of steps for a parameter, from its state or its group; None when it keeps none.

    It waits for the device where the count lives there.
    """
    step = number(optimizer.state.get(parameter, {}).get("step"))
    names = (name for name in ("step", "k") if name in group_rules(group))
    return step if step is not None else next((number(group[name]) for name in names), None)


def number(entry: object) -> float | None:
    """Return a real number, or what a tensor of one element holds, as a float; None for anything else."""
    if isinstance(entry, bool) or not isinstance(entry, (int, float, Tensor)):
        return None
    return float(entry) if not isinstance(entry, Tensor) or (entry.numel() == 1 and not entry.is_complex()) else None


def group_rules(group: Group) -> Mapping[str, Rule]:
    """Return the rules of a group's own entries: schedule-free optimizers have several, others at most a count."""
    names = _SCHEDULE_FREE if "weight_sum" in group else {"step": _taken}
    return {name: rule for name, rule in names.items() if name in group}


def _taken(group: Group, num_steps: int) -> float:
    return num_steps


def _setting(group: Group, name: str) -> float:
    return float(group[name])


# -- NAdam: Dozat 2016; ASGD: Polyak & Juditsky 1992, as torch has them ----------------------------------------------


def _mu_product(group: Group, num_steps: int) -> float:
    return _product_of_momenta(float(group["betas"][0]), _setting(group, "momentum_decay"), num_steps)


@functools.lru_cache(maxsize=256)
def _product_of_momenta(beta: float, decay: float, num_steps: int) -> float:
    enough = math.ceil(math.log(1e-40) / math.log(beta)) if 0 < beta < 1 else num_steps  # it is 0 to rounding by then
    steps = np.arange(1, min(num_steps, enough) + 1)
    return float(np.prod(beta * (1.0 - 0.5 * 0.96 ** (steps * decay))))


def _eta(group: Group, num_steps: int) -> float:
    """The rate of the next step. Torch computes it a step ahead, so that young rows see a new `lr` a step early."""
    lr = float(group["lr"])
    return float(lr / (1.0 + _setting(group, "lambd") * lr * num_steps) ** _setting(group, "alpha"))


def _mu(group: Group, num_steps: int) -> float:
    return 1.0 / max(1.0, num_steps - _setting(group, "t0"))


STATE_RULES: Mapping[str, Rule] = {"step": _taken, "mu_product": _mu_product, "eta": _eta, "mu": _mu}


# -- schedule-free: Defazio et al. 2024; the weight of a step goes by the largest rate up to it -----------------------


def _scheduled_lr(group: Group, num_steps: int) -> float:
    return float(_rates(group, num_steps)[-1]) if num_steps else 0.0


def _lr_max(group: Group, num_steps: int) -> float:
    return float(_rates(group, num_steps).max()) if num_steps else -1.0


def _weight_sum(group: Group, num_steps: int) -> float:
    largest = np.maximum.accumulate(_rates(group, num_steps))
    steps = np.arange(1, num_steps + 1, dtype=np.float64)
    return float(np.sum(steps ** _setting(group, "r") * largest ** _setting(group, "weight_lr_power")))


def _rates(group: Group, num_steps: int) -> NDArray[np.float64]:
    lr, warmup = float(group["lr"]), int(group.get("warmup_steps", 0))
    if "silent_sgd_phase" in group:
        return lr * _rectified(float(group["betas"][1]), bool(group["silent_sgd_phase"]), num_steps)
    return lr * _warmed_up(warmup, num_steps)


@functools.lru_cache(maxsize=64)
def _warmed_up(warmup: int, num_steps: int) -> NDArray[np.float64]:
    return np.minimum(np.arange(1, num_steps + 1) / max(warmup, 1), 1.0)


@functools.lru_cache(maxsize=64)
def _rectified(beta: float, is_silent: bool, num_steps: int) -> NDArray[np.float64]:
    """RAdam's rectification of each step (Liu et al. 2020, algorithm 2)."""
    steps = np.arange(1, num_steps + 1, dtype=np.float64)
    longest, power = 2.0 / (1.0 - beta) - 1.0, beta**steps
    length = longest - 2.0 * steps * power / (1.0 - power)
    is_long = length > 4.0
    safe = np.where(is_long, length, 5.0)
    ratio = (safe - 4.0) * (safe - 2.0) * longest / ((longest - 4.0) * (longest - 2.0) * safe)
    return np.where(is_long, np.sqrt(ratio), float(not is_silent))


_SCHEDULE_FREE: Mapping[str, Rule] = {
    "step": _taken,
    "k": _taken,
    "weight_sum": _weight_sum,
    "lr_max": _lr_max,
    "scheduled_lr": _scheduled_lr,
}
