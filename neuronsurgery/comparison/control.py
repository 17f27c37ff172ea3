"""A pole to be balanced, with senses and muscles that are exchanged for each task: advantage actor-critic on CartPole.

Rewards, physics and the length of episodes stay, so that every task is as hard as the first (Mnih et al. 2016 for the
learner: n-step returns, one network with a policy and a value, normalized advantages).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

from neuronsurgery.comparison.learning import Learner
from neuronsurgery.demo.digits import stream

if TYPE_CHECKING:
    from neuronsurgery.comparison.benchmarks import Scale

__all__ = ["balance"]

LONGEST = 500.0
NUM_ACTIONS = 2
HORIZON, DISCOUNT, VALUE_COST, ENTROPY_COST = 16, 0.99, 0.5, 0.01
SPREAD = torch.tensor([1.0, 1.0, 0.1, 1.0])
"""About the size of each observation."""


class Senses:
    """What is exchanged: the order and signs of observations, the order of actions."""

    def __init__(self, generator: torch.Generator) -> None:
        self.order = torch.randperm(len(SPREAD), generator=generator)
        self.signs = torch.randint(2, (len(SPREAD),), generator=generator) * 2.0 - 1.0
        self.actions = torch.randperm(NUM_ACTIONS, generator=generator).numpy()

    def seen(self, observations: Any) -> Tensor:
        """(num_envs, 4), as the learner sees it."""
        return (torch.as_tensor(observations, dtype=torch.float32) / SPREAD)[:, self.order] * self.signs


def balance(learner: Learner, scale: Scale, seed: int) -> Iterator[float]:
    """Lets a learner balance, and yields the mean return of the episodes of each task, over 500."""
    tasks, actions = stream(seed, "senses"), stream(seed, "actions")
    envs = gymnasium.make_vec("CartPole-v1", num_envs=scale.batch_size, vectorization_mode="sync")
    try:
        for task in range(scale.num_tasks):
            senses = Senses(tasks)
            observed = senses.seen(envs.reset(seed=1_000 * seed + task)[0])
            returns, ended = np.zeros(scale.batch_size), list[float]()
            for _ in range(scale.num_steps):
                played = [_step(learner, envs, senses, observed, actions)]
                while len(played) < HORIZON:
                    played.append(_step(learner, envs, senses, played[-1][-1], actions))
                for _, _, rewards, dones, _ in played:
                    returns += rewards
                    ended += returns[dones].tolist()
                    returns[dones] = 0.0
                observed = played[-1][-1]
                learner.learn(_loss(learner, played))
            ended += returns.tolist() if not ended else []
            yield float(np.mean(ended)) / LONGEST
    finally:
        envs.close()


Played = tuple[Tensor, Tensor, Any, Any, Tensor]
"""Observations, actions, rewards, which episodes ended, next observations."""


@torch.no_grad()
def _step(learner: Learner, envs: Any, senses: Senses, observed: Tensor, generator: torch.Generator) -> Played:
    probabilities = learner.model(observed)[:, :NUM_ACTIONS].softmax(dim=1)
    actions = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    found, rewards, terminated, truncated, _ = envs.step(senses.actions[actions.numpy()])
    return observed, actions, rewards, terminated | truncated, senses.seen(found)


def _loss(learner: Learner, played: list[Played]) -> Tensor:
    """The loss of an actor-critic over some steps of all environments; ends of episodes cut the returns."""
    with torch.no_grad():
        after = learner.model(played[-1][-1])[:, NUM_ACTIONS]
    targets: list[Tensor] = []
    for _, _, rewards, dones, _ in reversed(played):
        after = torch.as_tensor(rewards).float() + DISCOUNT * after * ~torch.as_tensor(dones)
        targets.insert(0, after)
    outputs = learner.model(torch.cat([each[0] for each in played]))
    logs, values, target = outputs[:, :NUM_ACTIONS].log_softmax(dim=1), outputs[:, NUM_ACTIONS], torch.cat(targets)
    advantages = (target - values).detach()
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-6)
    chosen = logs.gather(1, torch.cat([each[1] for each in played])[:, None])[:, 0]
    entropy = -(logs.exp() * logs).sum(dim=1).mean()
    critic = (values - target).square().mean() / LONGEST
    loss: Tensor = -(chosen * advantages).mean() + VALUE_COST * critic - ENTROPY_COST * entropy
    return loss
