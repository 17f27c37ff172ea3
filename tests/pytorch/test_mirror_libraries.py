"""Targets as libraries keep them: stable-baselines3 and torchrl, end to end."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from neuronsurgery import surgery
from neuronsurgery.pytorch.offsets import offsets_of
from neuronsurgery.pytorch.sites import discover

sb3 = pytest.importorskip("stable_baselines3")


def dqn(tau: float) -> Any:
    return sb3.DQN(
        "MlpPolicy", "CartPole-v1", tau=tau, target_update_interval=10 if tau == 1 else 1, learning_starts=16,
        batch_size=8, train_freq=2, policy_kwargs={"net_arch": [16, 16]}, device="cpu", seed=0,
    )  # fmt: skip


def sac() -> Any:
    return sb3.SAC(
        "MlpPolicy", "Pendulum-v1", learning_starts=8, batch_size=8, tau=0.1, policy_kwargs={"net_arch": [16, 16]},
        device="cpu", seed=0,
    )  # fmt: skip


UNITS = {"q_net.0": [1, 5], "q_net.2": [3]}


def rows(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if ".frozen_" in name}


def assert_same_rows(one: nn.Module, other: nn.Module) -> None:
    mine, theirs = rows(one), rows(other)
    assert mine and all(torch.equal(value, theirs[name]) for name, value in mine.items())


@pytest.mark.situation("Replicas", "stable-baselines3 DQN, target_update_interval and tau", "works")
@pytest.mark.parametrize("tau", [1.0, 0.1])
def test_dqn_of_stable_baselines_trains_on_with_a_shared_target(tau):
    agent = dqn(tau)
    agent.learn(50)
    surgery.knife(agent.q_net, surgery.Units(UNITS), optimizer=agent.policy.optimizer)
    surgery.mirror(agent.q_net, onto=agent.q_net_target, frozen="shared")
    agent.learn(50, reset_num_timesteps=False)
    assert_same_rows(agent.q_net, agent.q_net_target)
    surgery.knife(agent.q_net, surgery.Units(UNITS), optimizer=agent.policy.optimizer)
    surgery.mirror(agent.q_net, onto=agent.q_net_target, frozen="shared")
    for _ in range(200):
        sb3.common.utils.polyak_update(agent.q_net.parameters(), agent.q_net_target.parameters(), 0.2)
    obs = torch.randn(8, 4)
    assert torch.allclose(agent.q_net(obs), agent.q_net_target(obs), atol=1e-5)


@pytest.mark.situation("Replicas", 'stable-baselines3 DQN, frozen="own"', "refused")
@pytest.mark.parametrize("tau", [1.0, 0.1])
def test_dqn_of_stable_baselines_copies_parameters_alone_so_own_rows_are_refused(tau):
    agent = dqn(tau)
    agent.learn(44)  # some steps after the latest copy
    with torch.no_grad():
        agent.q_net.q_net[0].weight.add_(0.05)
    surgery.knife(agent.q_net, surgery.Units(UNITS), optimizer=agent.policy.optimizer)
    surgery.mirror(agent.q_net, onto=agent.q_net_target)
    agent.learn(30, reset_num_timesteps=False)
    assert offsets_of(discover(agent.q_net_target).places)["q_net.0"]
    with pytest.raises(surgery.MirrorError, match="mirrored with frozen='own'"):
        surgery.mirror(agent.q_net, onto=agent.q_net_target)


@pytest.mark.situation("Replicas", "stable-baselines3 SAC, twin critics with Polyak", "works")
def test_sac_of_stable_baselines_trains_on_with_shared_critic_targets():
    agent = sac()
    agent.learn(16)
    surgery.knife(agent.actor, surgery.Units({"latent_pi.0": [2]}), optimizer=agent.actor.optimizer)
    chosen = surgery.Units({"qf0.0": [1, 5], "qf1.2": [3]})
    surgery.knife(agent.critic, chosen, optimizer=agent.critic.optimizer)
    surgery.mirror(agent.critic, onto=agent.critic_target, frozen="shared")
    before = agent.critic.qf0[0].weight[[1, 5]].detach().clone()
    agent.learn(16, reset_num_timesteps=False)
    assert_same_rows(agent.critic, agent.critic_target)
    assert not torch.equal(agent.critic.qf0[0].weight[[1, 5]], before)
    obs, action = torch.randn(8, 3), torch.randn(8, 1)
    gaps = [
        (a - b).abs().max() for a, b in zip(agent.critic(obs, action), agent.critic_target(obs, action), strict=True)
    ]
    sb3.common.utils.polyak_update(agent.critic.parameters(), agent.critic_target.parameters(), 1.0)
    assert max(gaps) > 0
    assert all(map(torch.equal, agent.critic(obs, action), agent.critic_target(obs, action)))


# -- torchrl ---------------------------------------------------------------------------------------------------------


def loss_of(net: nn.Module) -> Any:
    from torchrl.data import OneHot
    from torchrl.modules import QValueActor
    from torchrl.objectives import DQNLoss

    loss = DQNLoss(QValueActor(net, in_keys=["observation"], spec=OneHot(2)), delay_value=True, action_space="one-hot")
    loss.make_value_estimator()
    return loss


def target_output(loss: Any, x: torch.Tensor) -> torch.Tensor:
    from tensordict import TensorDict

    with torch.no_grad(), loss.target_value_network_params.to_module(loss.value_network):
        out: torch.Tensor = loss.value_network(TensorDict({"observation": x}, [len(x)]))["action_value"]
        return out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.situation("Replicas", "torchrl SoftUpdate, the loss built after surgery", "works")
def test_soft_updates_of_torchrl_average_frozen_rows_of_a_loss_built_after_surgery():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchrl.objectives import SoftUpdate
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    surgery.knife(net, surgery.Units({"0": [1, 5]}))
    loss, x = loss_of(net), torch.randn(8, 4)
    update = SoftUpdate(loss, eps=0.5)
    expected = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1)
        for mine, theirs in zip(expected.parameters(), net.parameters(), strict=True):
            mine.lerp_(theirs, 0.5)
    update.step()
    assert torch.allclose(target_output(loss, x), expected(x), atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.situation("Replicas", "torchrl target parameters as onto=", "refused")
def test_parameters_without_modules_are_refused_as_targets():
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    loss = loss_of(net)
    surgery.knife(net, surgery.Units({"0": [1, 5]}))
    with pytest.raises(surgery.MirrorError, match="build the loss module anew"):
        surgery.mirror(net, onto=loss.target_value_network_params)
