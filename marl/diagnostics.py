"""What to look at when a mixer does not learn: its gradients and how its units saturate.

In matrix games these, rather than dead units, were seen to explain failures.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import TensorDict
from torch import Tensor

from marl.learner import Learner
from marl.losses import masked_mean
from marl.mixers import QMIX

__all__ = ["Diagnostics", "diagnose"]

SATURATED = -3.0
"""Below it the slope of an ELU is under 0.05."""


@dataclass(frozen=True)
class Diagnostics:
    """Figures over the steps that happened in a batch, a value for each seed (...)."""

    agent_q_spread: Tensor
    """Each agent's best minus worst value among its available actions, mean over agents and steps."""
    saturated_share: Tensor | None
    """Share of the inputs of QMIX's ELU units below -3; none for other mixers."""
    min_mixing_gradient: Tensor
    """The smallest dQ_tot/dQ_i of any agent at any step, as backpropagated."""
    mean_loss_gradient: Tensor
    """|dL/dQ_i|, mean over agents and steps."""


def diagnose(learner: Learner, episodes: TensorDict) -> Diagnostics:
    """Look at the online networks on a batch of episodes (..., B); their gradients are left alone."""
    mask = episodes["mask"]
    estimates = learner.estimate(episodes)
    mixing, of_loss = (
        torch.autograd.grad(output.sum(), estimates.chosen_qs, retain_graph=True)[0]
        for output in (estimates.q_tot, estimates.loss)
    )
    absent = ~mask.unsqueeze(-1)
    return Diagnostics(
        agent_q_spread=_spread(estimates.agent_qs.detach(), episodes),
        saturated_share=_saturated_share(learner, estimates.chosen_qs.detach(), episodes),
        min_mixing_gradient=mixing.masked_fill(absent, torch.inf).amin(dim=(-3, -2, -1)),
        mean_loss_gradient=masked_mean(of_loss.abs().mean(dim=-1), mask),
    )


def _spread(agent_qs: Tensor, episodes: TensorDict) -> Tensor:
    absent = ~episodes["avail_actions"]
    best, worst = agent_qs.masked_fill(absent, -torch.inf).amax(-1), agent_qs.masked_fill(absent, torch.inf).amin(-1)
    spread = (best - worst).clamp(min=0.0).mean(dim=-1)  # 0 where nothing is available
    return masked_mean(spread.narrow(-1, 0, spread.shape[-1] - 1), episodes["mask"])


def _saturated_share(learner: Learner, chosen_qs: Tensor, episodes: TensorDict) -> Tensor | None:
    mixer, mask = learner.online.mixer, episodes["mask"]
    if not isinstance(mixer, QMIX):
        return None
    state = episodes["state"].narrow(mask.ndim - 1, 0, mask.shape[-1])
    with torch.no_grad():
        inputs = mixer.mixing_inputs(chosen_qs, state)
    return masked_mean((inputs < SATURATED).to(inputs.dtype).mean(dim=-1), mask)
