"""The learner: double Q-learning on the joint value, for agents and mixer together.

Source: Rashid et al. 2018 (QMIX), with double Q-learning by van Hasselt et al. 2016. Seeds may train side by side
(`marl.stacking`): each has its own networks, targets, optimizer state, loss and bound on the gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.optim import Optimizer

from marl.errors import CheckpointError
from marl.losses import best_values, greedy_actions, masked_mean, td_lambda_targets, values_of
from marl.networks import Networks
from marl.replay import check_layout
from marl.settings import HardTargets, LossSettings, OptimizerSettings, Settings, TargetSettings
from marl.targets import copy_online, follow_online

__all__ = ["Estimates", "Learner", "Update", "bound_gradients", "make_learner"]


def make_learner(online: Networks, settings: Settings) -> Learner:
    """A learner of the networks given, with target networks equal to them.

    >>> from types import SimpleNamespace
    >>> from marl.networks import make_networks
    >>> from marl.settings import preset
    >>> settings = preset("pymarl", "qmix")
    >>> sizes = SimpleNamespace(num_agents=2, num_actions=3, obs_size=4, state_size=5)
    >>> learner = make_learner(make_networks(settings.agent, settings.mixer, sizes), settings)
    >>> learner.update_targets(num_episodes=200)
    True
    """
    target = copy.deepcopy(online).requires_grad_(False)
    optimizer = _make_optimizer(online.parameters(), settings.optimizer)
    return Learner(online, target, optimizer, settings.loss, settings.targets, settings.optimizer.max_grad_norm)


@dataclass(frozen=True)
class Estimates:
    """What the networks say of a batch of episodes."""

    agent_qs: Tensor
    """Each agent's values (..., B, T + 1, N, A)."""
    chosen_qs: Tensor
    """Those of the actions taken (..., B, T, N)."""
    q_tot: Tensor
    """Joint values of the actions taken (..., B, T)."""
    td_target: Tensor
    """What these should be (..., B, T), without gradient."""
    loss: Tensor
    """The loss, a value for each seed (...)."""


@dataclass(frozen=True)
class Update:
    """What an update did: a value for each seed (...), without gradient."""

    loss: Tensor
    """The loss before the update."""
    grad_norm: Tensor
    """Norm of the gradient of agents and mixer together, before it was bounded."""
    td_error: Tensor
    """Mean absolute error of the joint value over the steps that happened."""
    q_tot: Tensor
    """Mean joint value over them."""


@dataclass
class Learner:
    """Networks, their targets and the optimizer that trains them."""

    online: Networks
    """The networks that learn."""
    target: Networks
    """Their slow copies."""
    optimizer: Optimizer
    """Of all parameters of `online`."""
    loss: LossSettings
    """What values are trained toward."""
    targets: TargetSettings
    """How `target` follows `online`."""
    max_grad_norm: float
    """Bound on the norm of the gradient."""
    synced_at: int = 0
    """Episodes that had been collected when `target` last became a copy."""

    def update(self, episodes: TensorDict) -> Update:
        """One step of the optimizer on a batch of episodes (..., B), laid out as in `marl.replay`.

        Raises:
            BatchError: entries that do not fit each other.
        """
        estimates = self.estimate(episodes)
        self.optimizer.zero_grad()
        estimates.loss.sum().backward()  # type: ignore[no-untyped-call]
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        grad_norm = bound_gradients(trained, self.max_grad_norm, num_leading=estimates.loss.ndim)
        self.optimizer.step()
        return _summary(estimates, episodes["mask"], grad_norm)

    def update_targets(self, num_episodes: int) -> bool:
        """Let the targets follow, given how many episodes were collected so far; returns whether they moved."""
        if not isinstance(self.targets, HardTargets):
            follow_online(self.target, self.online, rate=self.targets.rate)
            return True
        if num_episodes - self.synced_at < self.targets.every:
            return False
        self.sync_targets(num_episodes)
        return True

    def sync_targets(self, num_episodes: int) -> None:
        """Make the targets copies at once, after so many episodes."""
        copy_online(self.target, self.online)
        self.synced_at = num_episodes

    def estimate(self, episodes: TensorDict) -> Estimates:
        """Values, targets and loss of a batch of episodes (..., B), laid out as in `marl.replay`.

        Raises:
            BatchError: entries that do not fit each other.
        """
        check_layout(episodes)
        actions, mask = episodes["actions"], episodes["mask"]
        agent_qs = self.online.agent.unroll(episodes["obs"], actions)
        now = _now(agent_qs, mask)
        chosen_qs = values_of(now, actions)
        max_qs = best_values(now.detach(), _now(episodes["avail_actions"], mask))
        q_tot = self.online.mixer(chosen_qs, _now(episodes["state"], mask), max_qs=max_qs, actions=actions)
        td_target = self._td_target(episodes, agent_qs.detach())
        loss = self.loss.scale * masked_mean((q_tot - td_target).square(), mask)
        return Estimates(agent_qs, chosen_qs, q_tot, td_target, loss)

    @torch.no_grad()
    def _td_target(self, episodes: TensorDict, agent_qs: Tensor) -> Tensor:
        """Double Q-learning: the online networks choose the next actions, the target networks value them."""
        mask, terminated = episodes["mask"], episodes["terminated"]
        reward: Tensor = episodes["reward"].to(agent_qs.dtype)
        if (terminated | ~mask).all():  # games of one step: nothing follows that would have a value
            return reward
        avail_actions = _after(episodes["avail_actions"], mask)
        actions = greedy_actions(_after(agent_qs, mask), avail_actions)
        target_qs = _after(self.target.agent.unroll(episodes["obs"], episodes["actions"]), mask)
        next_q_tot = self.target.mixer(
            values_of(target_qs, actions),
            _after(episodes["state"], mask),
            max_qs=best_values(target_qs, avail_actions),
            actions=actions,
        )
        gamma, td_lambda = self.loss.gamma, self.loss.td_lambda
        return td_lambda_targets(next_q_tot, reward, terminated, mask, gamma=gamma, td_lambda=td_lambda)

    def state_dict(self) -> dict[str, Any]:
        """Weights of both networks, the optimizer's state and the time of the last copy."""
        return {
            "online": self.online.state_dict(),
            "target": self.target.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "synced_at": self.synced_at,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            CheckpointError: the state is that of other networks, or of another kind of optimizer.
        """
        try:
            for part in ("online", "target", "optimizer"):
                getattr(self, part).load_state_dict(state[part])
            self.synced_at = state["synced_at"]
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"asked to load a learner's state, found one that does not fit ({' '.join(str(error).split())}): use "
                "the settings and the environment that it was saved with"
            ) from error


def bound_gradients(parameters: Sequence[nn.Parameter], max_norm: float, *, num_leading: int = 0) -> Tensor:
    """Scale gradients down to an L2 norm of at most `max_norm` over all of them; returns the norm before.

    Each index of the first `num_leading` dimensions has a norm of its own.

    >>> weight = nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> bound_gradients([weight], 1.0), weight.grad
    (tensor(5.), tensor([0.6000, 0.8000]))
    """
    if num_leading == 0:
        return nn.utils.clip_grad_norm_(parameters, max_norm)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = [torch.linalg.vector_norm(each.flatten(num_leading), dim=-1) for each in gradients]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for each in gradients:
        each.mul_(factor.reshape(factor.shape + (1,) * (each.ndim - num_leading)))
    return norm


def _make_optimizer(parameters: Iterable[nn.Parameter], settings: OptimizerSettings) -> Optimizer:
    learning_rate, epsilon = settings.learning_rate, settings.epsilon
    owned = list(parameters)
    if settings.kind == "adam":
        return torch.optim.Adam(owned, lr=learning_rate, eps=epsilon, fused=True)
    optimizer = torch.optim.RMSprop(owned, lr=learning_rate, alpha=settings.alpha, eps=epsilon)
    keep_roots_fast(optimizer)
    return optimizer


def keep_roots_fast(optimizer: Optimizer) -> None:
    """Keep the second moments of RMSprop above zero, in each step, by less than its epsilon can tell.

    Weights behind units that never fire have moments of exactly zero, of which MKL takes a root 20 times as long.
    """
    if isinstance(optimizer, torch.optim.RMSprop):
        optimizer.register_step_pre_hook(_raise_second_moments)


@torch.no_grad()
def _raise_second_moments(optimizer: Optimizer, *_: Any) -> None:
    for state in optimizer.state.values():
        moment: Tensor = state["square_avg"]
        moment.clamp_(min=4 * torch.finfo(moment.dtype).tiny)  # after the step's decay it is still a normal number


def _summary(estimates: Estimates, mask: Tensor, grad_norm: Tensor) -> Update:
    q_tot = estimates.q_tot.detach()
    td_error = masked_mean((q_tot - estimates.td_target).abs(), mask)
    return Update(estimates.loss.detach(), grad_norm.detach(), td_error, masked_mean(q_tot, mask))


def _now(entry: Tensor, mask: Tensor) -> Tensor:
    """The steps at which actions were taken: all but the last of T + 1."""
    return entry.narrow(mask.ndim - 1, 0, mask.shape[-1])


def _after(entry: Tensor, mask: Tensor) -> Tensor:
    """The steps behind the actions: all but the first of T + 1."""
    return entry.narrow(mask.ndim - 1, 1, mask.shape[-1])
