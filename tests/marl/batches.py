"""Batches of made-up episodes, with everything in them that a learner has to get right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict

from marl.learner import Learner, make_learner
from marl.networks import make_networks
from marl.settings import Settings


@dataclass(frozen=True)
class Sizes:
    num_agents: int = 3
    num_actions: int = 4
    obs_size: int = 5
    state_size: int = 6


SIZES = Sizes()

# How each of the episodes of a batch goes on: its length, and whether it truly ends there.
FATES = ((4, False), (2, True), (4, True), (3, True))


def made_up_episodes(
    sizes: Sizes = SIZES, fates: tuple[tuple[int, bool], ...] = FATES, *, seed: int = 0, state: str = "float"
) -> TensorDict:
    """Random episodes with unavailable actions, ends of both kinds and padding behind them."""
    generator = torch.Generator().manual_seed(seed)
    num_episodes, num_steps = len(fates), max(length for length, _ in fates)
    shape = (num_episodes, num_steps + 1)
    avail_actions = torch.rand(*shape, sizes.num_agents, sizes.num_actions, generator=generator) < 0.6
    actions = torch.randint(sizes.num_actions, (*shape, sizes.num_agents), generator=generator)
    avail_actions.scatter_(-1, actions.unsqueeze(-1), True)
    mask = torch.zeros(num_episodes, num_steps, dtype=torch.bool)
    terminated = torch.zeros_like(mask)
    for episode, (length, ends) in enumerate(fates):
        mask[episode, :length] = True
        terminated[episode, length - 1] = ends
        avail_actions[episode, length + 1 :] = False
    states = torch.randn(*shape, sizes.state_size, generator=generator)
    entries: dict[str, Any] = {
        "obs": torch.randint(3, (*shape, sizes.num_agents, sizes.obs_size), generator=generator).to(torch.uint8),
        "state": states if state == "float" else (states > 0).to(torch.uint8),
        "avail_actions": avail_actions,
        "actions": actions[:, :-1].clone(),
        "reward": torch.randn(num_episodes, num_steps, generator=generator) * mask,
        "terminated": terminated,
        "mask": mask,
    }
    return TensorDict(entries, batch_size=[num_episodes])


def new_learner(settings: Settings, sizes: Sizes = SIZES, *, seed: int = 0) -> Learner:
    """A learner in float64 whose target networks are not its online networks."""
    torch.manual_seed(seed)
    learner = make_learner(make_networks(settings.agent, settings.mixer, sizes).double(), settings)
    torch.manual_seed(seed + 1000)
    others = make_networks(settings.agent, settings.mixer, sizes).double()
    learner.target.load_state_dict(others.state_dict())
    return learner
