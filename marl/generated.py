"""Units whose weights are generated: what is stagnant among QMIX's ELU units, which have no parameters of their own."""

from __future__ import annotations

import torch
from einops import rearrange
from tensordict import TensorDict
from torch import Tensor

from marl.learner import Learner
from marl.mixers import QMIX
from marl.surgery import stagnant_share, unit_shares

__all__ = ["all_shares", "generated_stagnant_share"]

NAME = "mixer/generated_stagnant"


def all_shares(learner: Learner, episodes: TensorDict) -> dict[str, float]:
    """`marl.surgery.unit_shares`, and where there are such units `mixer/generated_stagnant` beside them.

    >>> from marl.rollout import collect
    >>> from marl.run import make_run
    >>> from marl.run_settings import run_settings
    >>> run = make_run(run_settings("qmix", "predator_prey_tiny"))
    >>> NAME in all_shares(run.learner, collect(run.environment, run.agent, epsilon=1.0, seed=0))
    True
    """
    found: list[Tensor | None] = []

    def loss_of(batch: TensorDict) -> Tensor:
        loss, share = _loss_and_share(learner, batch)
        found.append(share)
        return loss

    shares = unit_shares(learner, episodes, loss_of)
    return shares if found[0] is None else {**shares, NAME: float(found[0])}


def generated_stagnant_share(learner: Learner, episodes: TensorDict) -> Tensor | None:
    """The share of QMIX's ELU units (...) that are stagnant on a batch of episodes (..., B); none for other mixers.

    A unit's weights are those that its hypernetwork generates for it, one for each agent, in all steps that happened.
    The learner is left as it was.
    """
    return _loss_and_share(learner, episodes)[1]


def _loss_and_share(learner: Learner, episodes: TensorDict) -> tuple[Tensor, Tensor | None]:
    """The loss to learn from, not yet differentiated, and that share."""
    mixer = learner.online.mixer
    if not isinstance(mixer, QMIX):
        return learner.estimate(episodes).loss.sum(), None
    found: list[Tensor] = []
    handle = mixer.w1.register_forward_hook(lambda _, inputs, output: found.append(output))
    try:
        loss = learner.estimate(episodes).loss.sum()
    finally:
        handle.remove()
    (generated,) = found
    (gradient,) = torch.autograd.grad(loss, generated, retain_graph=True)
    values = torch.stack([generated.detach(), gradient]) * episodes["mask"].unsqueeze(-1)
    weight_norms, gradient_norms = rearrange(values, "k ... b t (n e) -> k ... e (b t n)", n=mixer.num_agents).norm(
        dim=-1
    )
    return loss, stagnant_share(weight_norms, gradient_norms)
