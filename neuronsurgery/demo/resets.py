"""The plain reset: units start over and nothing of the old ones is kept. The comparison for composite units.

It is what Sokar et al. 2023 and others do, with two choices made so that the comparison is fair: the units
are the ones KNIFE would choose, and Adam treats their rows as a new network's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam

__all__ = ["FreshRows", "redraw"]


class FreshRows:
    """Lets rows of an Adam optimizer start over, as if they had just been created, while the others go on.

    Adam counts the steps of a whole parameter. A row whose moments are zeroed under an old count takes first
    updates that are about three times too large, so the updates of restarted rows are recomputed from Adam's
    moments with the bias corrections for their own number of steps (Kingma & Ba 2015, algorithm 1). The other
    rows keep torch's update bit for bit. Made for plain Adam: one parameter group, no decay, no AMSGrad.
    """

    def __init__(self, optimizer: Adam) -> None:
        self._optimizer = optimizer
        self._births: dict[nn.Parameter, Tensor] = {}
        self._before: dict[nn.Parameter, Tensor] = {}
        optimizer.register_step_pre_hook(self._remember)
        optimizer.register_step_post_hook(self._correct)

    @torch.no_grad()
    def restart(self, parameters: Iterable[nn.Parameter], rows: Iterable[int]) -> None:
        """Gives the rows (along dim 0) of each parameter the state of new ones."""
        index = torch.tensor(list(rows), dtype=torch.long)
        for parameter in parameters:
            state = self._optimizer.state[parameter]
            state["exp_avg"][index] = 0.0
            state["exp_avg_sq"][index] = 0.0
            column = (-1,) + (1,) * (parameter.dim() - 1)
            # In float64, as Adam has it: 1 - 0.999 in float32 is off by 1e-5 of itself.
            zeros = torch.zeros(len(parameter), dtype=torch.float64).view(column)
            births = self._births.setdefault(parameter, zeros)
            births[index] = float(state["step"])

    def _remember(self, *_: Any) -> None:
        self._before = {parameter: parameter.detach().clone() for parameter in self._births}

    @torch.no_grad()
    def _correct(self, *_: Any) -> None:
        settings = self._optimizer.defaults
        for parameter, births in self._births.items():
            state = self._optimizer.state[parameter]
            age = state["step"] - births
            first, second = ((1.0 - beta**age).to(parameter.dtype) for beta in settings["betas"])
            scale = (state["exp_avg_sq"] / second).sqrt_().add_(settings["eps"])
            updated = self._before[parameter].addcdiv_(state["exp_avg"] / first, scale, value=-settings["lr"])
            parameter.copy_(torch.where(births > 0, updated, parameter))


@torch.no_grad()
def redraw(layer: nn.Linear, units: Iterable[int], generator: torch.Generator) -> None:
    """Draws rows as `nn.Linear` draws them: weights and biases uniform within 1 / sqrt(in_features).

    >>> layer = nn.Linear(4, 2)
    >>> kept = layer.weight[0].clone()
    >>> redraw(layer, [1], torch.Generator().manual_seed(0))
    >>> bool((layer.weight[0] == kept).all()), bool(layer.weight[1].abs().max() <= 0.5)
    (True, True)
    """
    index = torch.tensor(list(units), dtype=torch.long)
    bound = 1.0 / math.sqrt(layer.in_features)
    for parameter in layer.parameters():
        drawn = torch.empty_like(parameter[index]).uniform_(-bound, bound, generator=generator)
        parameter[index] = drawn
