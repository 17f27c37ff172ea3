"""Playing games in tests: policies, and what an episode returns."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from marl.environments.protocol import Environment

Policy = Callable[[Tensor, torch.Generator], Tensor]


def uniform_actions(avail_actions: Tensor, generator: torch.Generator) -> Tensor:
    """Draws evenly among the available actions (B, N, A), as (B, N)."""
    scores = torch.rand(avail_actions.shape, generator=generator)
    return scores.masked_fill(~avail_actions, -1.0).argmax(dim=2)


def keen_actions(avail_actions: Tensor, generator: torch.Generator) -> Tensor:
    """Catches wherever it can with probability a half, so that many prey are captured."""
    drawn = uniform_actions(avail_actions, generator)
    keen = avail_actions[..., -1] & (torch.rand(drawn.shape, generator=generator) < 0.5)
    return torch.where(keen, avail_actions.shape[2] - 1, drawn)


def uniform_returns(environment: Environment, num_batches: int) -> Tensor:
    """The returns of the uniform policy over this many batches of episodes."""
    generator = torch.Generator().manual_seed(1)
    returns = []
    for _ in range(num_batches):
        observation = environment.reset()
        total = torch.zeros(environment.batch_size)
        for _ in range(environment.spec.episode_limit):
            outcome = environment.step(uniform_actions(observation.avail_actions, generator))
            observation, total = outcome.observation, total + outcome.reward
        returns.append(total)
    return torch.cat(returns)
