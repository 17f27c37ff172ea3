"""What mixers promise, measured: that the joint value rises with each agent's, and where its maximum lies."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from marl.losses import best_values, greedy_actions, values_of
from marl.mixers import Mixer

N, A, S = 3, 4, 5

Target = Callable[[Tensor], Tensor]


def made_up(num: int) -> dict[str, Any]:
    agent_qs, avail_actions = 4 * torch.randn(num, N, A).double(), torch.rand(num, N, A) < 0.6
    avail_actions[..., 0] = True
    return {"agent_qs": agent_qs, "avail_actions": avail_actions, "state": 3 * torch.randn(num, S).double()}


def joint_value(mixer: Mixer, batch: dict[str, Any], actions: Tensor) -> Tensor:
    chosen_qs = values_of(batch["agent_qs"], actions)
    max_qs = best_values(batch["agent_qs"], batch["avail_actions"])
    value: Tensor = mixer(chosen_qs, batch["state"], max_qs=max_qs, actions=actions)
    return value


def falling(chosen_qs: Tensor) -> Tensor:
    """What a mixer must not learn: values that fall as the agents' values rise."""
    return -2 * chosen_qs.sum(dim=-1)


def train(
    mixer: Mixer, batch: dict[str, Any], target: Target, *, optimizer: Optimizer | None = None, num_updates: int = 200
) -> None:
    """Updates toward a target that is computed from the agents' values of random actions."""
    optimizer = optimizer or torch.optim.Adam(mixer.parameters(), lr=1e-2)
    for _ in range(num_updates):
        actions = torch.randint(A, batch["agent_qs"].shape[:-1])
        error = joint_value(mixer, batch, actions) - target(values_of(batch["agent_qs"], actions))
        optimizer.zero_grad()
        error.square().mean().backward()
        optimizer.step()


def slopes(mixer: Mixer, batch: dict[str, Any]) -> Tensor:
    """dQ_tot/dQ_i at random actions: (num, N)."""
    actions = torch.randint(A, batch["agent_qs"].shape[:-1])
    chosen_qs = values_of(batch["agent_qs"], actions).requires_grad_()
    max_qs = best_values(batch["agent_qs"], batch["avail_actions"])
    value = mixer(chosen_qs, batch["state"], max_qs=max_qs, actions=actions)
    return torch.autograd.grad(value.sum(), chosen_qs)[0]


def min_slope(mixer: Mixer, batch: dict[str, Any]) -> float:
    """The smallest dQ_tot/dQ_i; below 0 is a fault of QMIX."""
    return float(slopes(mixer, batch).min())


@torch.no_grad()
def igm_gaps(mixer: Mixer, batch: dict[str, Any]) -> Tensor:
    """How much the best available joint action is worth above that of each agent's best (num,); above 0 is a fault."""
    greedy = joint_value(mixer, batch, greedy_actions(batch["agent_qs"], batch["avail_actions"]))
    gaps = []
    for joint in itertools.product(range(A), repeat=N):
        actions = torch.tensor(joint).expand(len(greedy), N)
        possible = batch["avail_actions"].gather(-1, actions.unsqueeze(-1)).squeeze(-1).all(dim=-1)
        gaps.append((joint_value(mixer, batch, actions) - greedy).masked_fill(~possible, -torch.inf))
    return torch.stack(gaps).amax(dim=0)


def igm_gap(mixer: Mixer, batch: dict[str, Any]) -> float:
    """The largest of the gaps."""
    return float(igm_gaps(mixer, batch).max())
