"""UPGD: an optimizer that moves weights the less, and perturbs them the less, the more useful they are.

Elsayed & Mahmood 2024, first-order global utility. As every optimizer, it is told of parameters, not of units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from neuronsurgery.errors import OptimizerError

__all__ = ["UPGD"]


class UPGD(Optimizer):
    """Utility-based perturbed gradient descent.

        u <- beta u + (1 - beta) (-g w)         utility, an average with decay `beta_utility`
        s  = sigmoid(u / (1 - beta ** t) / max u)   the maximum over all parameters, as published without correction
        w <- (1 - lr weight_decay) w - 2 lr (g + xi) (1 - s)        xi ~ normal(0, sigma ** 2)

    Where the maximum is zero, so that there is nothing to tell weights apart by, s is 1/2.

    Args:
        params: as for every optimizer of torch.
        lr: step size.
        weight_decay: decoupled decay.
        beta_utility: decay of the average of utilities.
        sigma: standard deviation of the noise.
        generator: the source of the noise, on the parameters' device. None: torch's own.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-5,
        *,
        weight_decay: float = 1e-3,
        beta_utility: float = 0.999,
        sigma: float = 1e-3,
        generator: torch.Generator | None = None,
    ) -> None:
        if lr < 0 or weight_decay < 0 or sigma < 0 or not 0 <= beta_utility < 1:
            raise OptimizerError(
                f"UPGD(lr={lr}, weight_decay={weight_decay}, beta_utility={beta_utility}, sigma={sigma}) was asked "
                "for; lr, weight_decay and sigma are from 0 on, beta_utility is from 0 to below 1"
            )
        defaults = {"lr": lr, "weight_decay": weight_decay, "beta_utility": beta_utility, "sigma": sigma}
        super().__init__(params, defaults)
        self.generator = generator

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step, on the gradients that are there or on those of the closure, whose loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        due = list(self._due())
        if not due:
            return loss
        largest = torch.stack([self._utility(parameter, group).max().cpu() for parameter, group in due]).max()
        for parameter, group in due:
            self._move(parameter, group, largest.to(parameter.device))
        return loss

    def _due(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        for group in self.param_groups:
            yield from ((parameter, group) for parameter in group["params"] if parameter.grad is not None)

    def _utility(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["step"], state["utility"] = 0, torch.zeros_like(parameter)
        state["step"] += 1
        assert parameter.grad is not None
        utility: Tensor = state["utility"]
        return utility.lerp_(-parameter.grad * parameter, 1 - group["beta_utility"])

    def _move(self, parameter: Tensor, group: dict[str, Any], largest: Tensor) -> None:
        state = self.state[parameter]
        corrected = state["utility"] / (1 - group["beta_utility"] ** state["step"])
        scaled = torch.sigmoid(torch.where(largest == 0, torch.zeros_like(corrected), corrected / largest))
        noise = torch.empty_like(parameter).normal_(0.0, 1.0, generator=self.generator) * group["sigma"]
        assert parameter.grad is not None
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_(2 * group["lr"] * (parameter.grad + noise) * (1 - scaled))
