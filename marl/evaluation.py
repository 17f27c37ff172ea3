"""Evaluation: greedy episodes on games of their own, which touch nothing of the training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import TensorDict
from torch import Tensor

from marl.agents import Agent
from marl.environments.protocol import Environment
from marl.rollout import collect, whole

__all__ = ["Evaluation", "Interval", "evaluate", "interval_of", "returns_of"]

NUM_RESAMPLES = 10_000


@dataclass(frozen=True)
class Evaluation:
    """What the episodes were worth, and how long they were."""

    returns: Tensor
    """Undiscounted return of each episode (B,)."""
    lengths: Tensor
    """Steps of each episode (B,)."""
    won: Tensor | None = None
    """Whether each episode (B,) was won; none where there is nothing to be won."""

    @property
    def win_rate(self) -> float | None:
        """The share of episodes that were won; none where there is nothing to be won."""
        return None if self.won is None else float(self.won.float().mean())

    @property
    def mean_return(self) -> float:
        """Over all episodes."""
        return float(self.returns.mean())

    @property
    def standard_error(self) -> float:
        """Of the mean return; not a number for a single episode."""
        return float(self.returns.std() / len(self.returns) ** 0.5)


def evaluate(
    environment: Environment, agent: Agent, *, seed: int, num_episodes: int, epsilon: float = 0.0
) -> Evaluation:
    """The returns of at least `num_episodes` episodes, rounded up to whole batches of the environment.

    Fewer where games broke, whose returns mean nothing.

    >>> from marl.agents import AgentInputs, FeedForwardAgent
    >>> from marl.environments import make_environment
    >>> agent = FeedForwardAgent(AgentInputs(num_agents=2, num_actions=3, obs_size=5))
    >>> environment = make_environment("matrix_game", batch_size=4, payoff=[[5, 5, 5]] * 3)
    >>> evaluate(environment, agent, seed=0, num_episodes=8).mean_return
    5.0
    """
    num_rounds = -(-num_episodes // environment.batch_size)
    rounds = [whole(collect(environment, agent, epsilon=epsilon, seed=seed + n)) for n in range(num_rounds)]
    lengths = [episodes["mask"].sum(dim=-1) for episodes in rounds]
    won = torch.cat([episodes["won"] for episodes in rounds]) if "won" in rounds[0] else None
    return Evaluation(torch.cat([returns_of(episodes) for episodes in rounds]), torch.cat(lengths), won)


def returns_of(episodes: TensorDict) -> Tensor:
    """Undiscounted returns (B,) of episodes."""
    returns: Tensor = (episodes["reward"] * episodes["mask"]).sum(dim=-1)
    return returns


@dataclass(frozen=True)
class Interval:
    """Where a mean lies, with 95 % confidence."""

    low: float
    """Lower end."""
    high: float
    """Upper end."""


def interval_of(values: Tensor, *, seed: int = 0) -> Interval:
    """The percentile bootstrap's interval of the mean of some values (B,). Source: Efron 1979.

    >>> interval_of(torch.tensor([5.0, 5.0]))
    Interval(low=5.0, high=5.0)
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(values), (NUM_RESAMPLES, len(values)), generator=generator)
    means = values.double()[chosen].mean(dim=-1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(low, high)
