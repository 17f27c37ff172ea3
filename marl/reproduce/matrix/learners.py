"""Who learns: the networks and the optimizer of matrix games, and one update on games of one step.

`update` is `Learner.update` without what games of one step have no use for: the observation after the end, targets,
masks. What all games of a batch share, a constant observation, is computed once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from marl.agents import NO_ACTION
from marl.environments.protocol import Spec
from marl.errors import SettingsError
from marl.learner import Learner, bound_gradients, make_learner
from marl.losses import values_of
from marl.mixers import QPLEX
from marl.networks import make_networks
from marl.reproduce.matrix.tasks import NUM_ACTIONS, NUM_AGENTS
from marl.seeding import seed_for
from marl.settings import AgentSettings, Algorithm, QMIXSettings, QPLEXSettings, Settings, VDNSettings, preset

__all__ = ["LearnerSettings", "agent_values", "episodes_of", "joint_values", "make_one", "update"]

Choose = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From the agents' values (R, B or 1, N, A) to actions (R, B, N) and rewards (R, B)."""


@dataclass(frozen=True)
class LearnerSettings:
    """The networks and the optimizer; what is not said is as in PyMARL."""

    algorithm: Algorithm = "qmix"
    """VDN, QMIX or QPLEX; QPLEX with attention networks of two layers, as in ReBorn."""
    agent: Literal["feed_forward", "recurrent"] = "feed_forward"
    """Two hidden layers, or one and a GRU cell."""
    activation_fn: Literal["relu", "leaky_relu"] = "relu"
    """Of all hidden layers."""
    learning_rate: float = 5e-4
    """Of RMSprop."""
    exploration: Literal["uniform", "epsilon"] = "uniform"
    """All actions at random, or fewer and fewer over the first half of each task, down to 5 %."""
    agent_size: int = 64
    """Units of the agents' hidden layers."""
    hypernet_size: int = 64
    """Units of the hypernetworks' hidden layers."""
    embed_size: int = 32
    """Units of QMIX's mixing layer, and of the hidden layer of V(s)."""

    def __post_init__(self) -> None:
        for name, choices in {
            "agent": ("feed_forward", "recurrent"),
            "activation_fn": ("relu", "leaky_relu"),
            "exploration": ("uniform", "epsilon"),
        }.items():
            if getattr(self, name) not in choices:
                raise SettingsError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(choices)}")

    def epsilon(self, update: int, num_updates: int) -> float:
        """The share of actions at random in an update of a task.

        >>> [LearnerSettings(exploration="epsilon").epsilon(update, 100) for update in (0, 25, 50, 99)]
        [1.0, 0.525, 0.05, 0.05]
        """
        if self.exploration == "uniform":
            return 1.0
        return round(1.0 - 0.95 * min(1.0, 2 * update / num_updates), 6)

    def settings(self) -> Settings:
        """As the networks and the learner are made from."""
        base = preset("pymarl", self.algorithm)
        mixer: VDNSettings | QMIXSettings | QPLEXSettings = base.mixer
        if isinstance(mixer, QMIXSettings):
            mixer = replace(mixer, embed_size=self.embed_size, hypernet_size=self.hypernet_size)
        elif isinstance(mixer, QPLEXSettings):
            size = self.hypernet_size
            mixer = replace(mixer, adversary_layers=2, adversary_size=size, hypernet_size=size)
        num_layers = 1 if self.agent == "recurrent" else 2
        agent = AgentSettings(self.agent, self.agent_size, num_layers, ("obs", "agent_id"))
        optimizer = replace(base.optimizer, learning_rate=self.learning_rate)
        return replace(base, mixer=mixer, agent=agent, optimizer=optimizer)


def make_one(settings: LearnerSettings, obs_size: int, seed: int) -> Learner:
    """The learner of a seed, as it is at the beginning.

    >>> sum(parameter.numel() for parameter in make_one(LearnerSettings("vdn"), 5, seed=0).online.parameters())
    4867
    """
    spec = Spec(NUM_AGENTS, NUM_ACTIONS, obs_size, obs_size, episode_limit=1)
    learning = settings.settings()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "weights"))
        networks = make_networks(learning.agent, learning.mixer, spec)
    if settings.activation_fn == "leaky_relu":
        _exchange_activation_functions(networks)
    return make_learner(networks, learning)


def update(learner: Learner, obs: Tensor, choose: Choose) -> Tensor:
    """One step of the optimizer on games (R, B) of one step; returns the losses (R,).

    `obs` (R, B, O), or (R, 1, O) where all games look alike, is what each agent observes, and the state.
    """
    agent_qs = agent_values(learner, obs)
    actions, reward = choose(agent_qs.detach())
    q_tot = joint_values(learner, agent_qs, obs, actions)
    loss = learner.loss.scale * (q_tot - reward).square().mean(dim=-1)
    learner.optimizer.zero_grad()
    loss.sum().backward()  # type: ignore[no-untyped-call]
    trained = [parameter for group in learner.optimizer.param_groups for parameter in group["params"]]
    bound_gradients(trained, learner.max_grad_norm, num_leading=loss.ndim)
    learner.optimizer.step()
    return loss.detach()


def agent_values(learner: Learner, obs: Tensor) -> Tensor:
    """Each agent's values at the first and only step, (R, B, N, A) for what all observe (R, B, O)."""
    agent = learner.online.agent
    own = obs.unsqueeze(-2).expand(*obs.shape[:-1], NUM_AGENTS, -1)
    last_actions = torch.full(own.shape[:-1], NO_ACTION)
    agent_qs: Tensor
    agent_qs, _ = agent(own, last_actions, agent.initial_hidden(own))
    return agent_qs


def joint_values(learner: Learner, agent_qs: Tensor, state: Tensor, actions: Tensor) -> Tensor:
    """The joint values (R, B) of actions (R, B, N); values and states may be of one game, for all."""
    mixer = learner.online.mixer
    max_qs = agent_qs.detach().amax(dim=-1)
    all_qs = agent_qs.expand(*actions.shape, -1)
    if isinstance(mixer, QPLEX):  # joins states and actions
        state = state.expand(*actions.shape[:-1], -1)
    q_tot: Tensor = mixer(values_of(all_qs, actions), state, max_qs=max_qs, actions=actions)
    return q_tot


def episodes_of(obs: Tensor, actions: Tensor, reward: Tensor) -> TensorDict:
    """Games (B,) of one seed as what the replay remembers: observations (B or 1, O), actions (B, N), rewards (B,)."""
    num_games = len(actions)
    shown = torch.stack([obs.expand(num_games, -1), torch.zeros(num_games, obs.shape[-1])], dim=1)
    once = torch.ones(num_games, 1, dtype=torch.bool)
    entries = {
        "obs": shown.unsqueeze(2).expand(-1, -1, NUM_AGENTS, -1),
        "state": shown,
        "avail_actions": torch.ones(num_games, 2, NUM_AGENTS, NUM_ACTIONS, dtype=torch.bool),
        "actions": actions.unsqueeze(1),
        "reward": reward.unsqueeze(1),
        "terminated": once,
        "mask": once,
    }
    return TensorDict(entries, batch_size=[num_games])


def _exchange_activation_functions(networks: nn.Module) -> None:
    for module in list(networks.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.LeakyReLU())
