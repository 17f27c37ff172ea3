"""Which entries of a TorchRL environment belong to which agents.

TorchRL keeps agents that look alike in one entry, a group, with a dimension for the agents: `("agents", "observation")`
is (..., agents, features). A single agent is at the root, with no such dimension.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from marl.errors import MissingExtraError, SettingsError

try:
    from torchrl.data import Categorical, OneHot
    from torchrl.envs import EnvBase
except ImportError as error:
    raise MissingExtraError.of("torchrl") from error

Key = tuple[str, ...]
MASK = "action_mask"


@dataclass(frozen=True)
class Group:
    """Agents in one entry, and the keys of what is theirs."""

    action: Key
    """Their actions, (..., agents), or (..., agents, actions) as one-hot."""
    obs: Key
    """What they see, (..., agents, features)."""
    mask: Key | None
    """Their available actions, (..., agents, actions), bool; none where all are always available."""
    reward: Key
    """Their rewards, (..., agents, 1), or one for all agents at the root, (..., 1)."""
    num_agents: int
    num_actions: int
    action_spec: Categorical | OneHot

    def encoded(self, actions: Tensor) -> Tensor:
        """The actions (B, agents), int64, as TorchRL wants them."""
        spec = self.action_spec
        if isinstance(spec, OneHot):
            actions = torch.nn.functional.one_hot(actions, self.num_actions)
        return actions.reshape(spec.shape).to(spec.dtype)


def read_groups(env: EnvBase, obs_key: str) -> list[Group]:
    """The groups of an environment, in the order of their names; raises `SettingsError` where they are no team."""
    groups = [read_group(env, as_tuple(key), obs_key) for key in env.action_keys]
    observations = env.full_observation_spec
    sizes = {
        (group.num_actions, observations[group.obs].shape[len(env.batch_size) :].numel() // group.num_agents)
        for group in groups
    }
    if len(sizes) > 1:
        found = " and ".join(f"{num_actions} actions and observations of {size}" for num_actions, size in sorted(sizes))
        raise SettingsError(f"all agents need the same sizes; found groups with {found}")
    return groups


def read_group(env: EnvBase, action: Key, obs_key: str) -> Group:
    """The group whose actions are at this key."""
    spec = env.full_action_spec[action]
    if type(spec) not in (Categorical, OneHot):  # their subclasses are several actions in one
        found = f"{type(spec).__name__} at {'.'.join(action)}"
        raise SettingsError(f"discrete actions are needed, Categorical or OneHot; found {found}")
    shape = spec.shape[len(env.batch_size) :]
    prefix = action[:-1]
    observed = keys_below(prefix, env.full_observation_spec.keys(True, True))
    rewarded = keys_below(prefix, env.reward_keys)
    return Group(
        action=action,
        obs=(*prefix, choose_obs(obs_key, observed - {MASK}, prefix)),
        mask=(*prefix, MASK) if MASK in observed else None,
        reward=(*prefix, "reward") if "reward" in rewarded else ("reward",),
        num_agents=(shape[:-1] if isinstance(spec, OneHot) else shape).numel(),
        num_actions=spec.space.n,
        action_spec=spec,
    )


def choose_obs(wanted: str, found: Collection[str], prefix: Key) -> str:
    """The name of a group's observation: the one wanted, or else the only one there is."""
    if wanted in found:
        return wanted
    if len(found) == 1:
        return next(iter(found))
    place = ".".join(prefix) or "the root"
    names = ", ".join(sorted(found)) or "nothing"
    raise SettingsError(f"there is no observation {wanted!r} at {place}; found {names}: name one as obs_key")


def keys_below(prefix: Key, keys: Sequence[str | Key]) -> set[str]:
    """The last parts of the keys that are in this entry itself.

    >>> sorted(keys_below(("agents",), ["state", ("agents", "observation"), ("agents", "info", "x")]))
    ['observation']
    """
    return {key[-1] for key in map(as_tuple, keys) if key[:-1] == prefix}


def as_tuple(key: str | Key) -> Key:
    """A key as the tuple of its parts.

    >>> as_tuple("reward")
    ('reward',)
    """
    return (key,) if isinstance(key, str) else tuple(key)
