"""Policies of `stable-baselines3` as its algorithms make them, on spaces alone: no environment runs.

The library is imported where a policy is built, because that takes a second and most tests need none of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.specimen import Specimen

__all__ = ["SPECIMENS"]


def constant_rate(_: float) -> float:
    return 3e-4


def ppo_mlp() -> nn.Module:
    from gymnasium.spaces import Box, Discrete
    from stable_baselines3.ppo import MlpPolicy

    return MlpPolicy(Box(-1.0, 1.0, (6,)), Discrete(3), constant_rate, net_arch=[24, 24])  # type: ignore[no-any-return]


def ppo_cnn() -> nn.Module:
    from gymnasium.spaces import Box, Discrete
    from stable_baselines3.ppo import CnnPolicy

    space = Box(0, 255, (2, 36, 36), "uint8")
    return CnnPolicy(space, Discrete(3), constant_rate, features_extractor_kwargs={"features_dim": 32})  # type: ignore[no-any-return]


def dqn_mlp() -> nn.Module:
    from gymnasium.spaces import Box, Discrete
    from stable_baselines3.dqn import MlpPolicy

    policy = MlpPolicy(Box(-1.0, 1.0, (6,)), Discrete(3), constant_rate, net_arch=[24, 24])
    return policy.q_net  # type: ignore[no-any-return]


def vectors() -> tuple[Tensor]:
    return (torch.rand(5, 6) * 2 - 1,)


def frames() -> tuple[Tensor]:
    return (torch.randint(0, 256, (3, 2, 36, 36), dtype=torch.uint8),)


def actor_critic(output: Any) -> Tensor:
    _, value, log_probability = output
    return (value - 1.0).square().mean() - log_probability.mean()  # type: ignore[no-any-return]


# Their preprocessing casts observations to float32.
SPECIMENS = (
    Specimen("PPO MlpPolicy", "stable-baselines3", ppo_mlp, vectors, actor_critic, dtype=torch.float32),
    Specimen("PPO CnnPolicy", "stable-baselines3", ppo_cnn, frames, actor_critic, dtype=torch.float32),
    Specimen("DQN MlpPolicy", "stable-baselines3", dqn_mlp, vectors, dtype=torch.float32),
)
