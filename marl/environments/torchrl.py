"""Environments of TorchRL as ours, and ours as environments of TorchRL.

Through TorchRL's wrappers the first brings in PettingZoo, MPE2, VMAS, SMACv2 and others. What TorchRL leaves open is
settled here: agents in several groups become one team with one reward, and an environment without a state gets all
observations side by side for one.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from marl.environments.protocol import Clock, Environment, Observation, Outcome, Spec, checked_actions, outcome
from marl.environments.torchrl_groups import Group, Key, as_tuple, read_groups
from marl.errors import MissingExtraError, SettingsError

try:
    from tensordict import TensorDict, TensorDictBase
    from torchrl.data import Categorical, Composite, Unbounded
    from torchrl.envs import EnvBase
except ImportError as error:
    raise MissingExtraError.of("torchrl") from error

TEAM_REWARDS = {"mean": torch.mean, "sum": torch.sum}


class TorchRLEnvironment:
    """An environment of TorchRL as one of ours.

    `env` has the batch size (B,), for example a `SerialEnv` of B workers or an environment vectorized over B, or none,
    which makes one episode. Its actions are discrete. All agents of all groups are one team, in the order of the names
    of the groups, with the same sizes. The team's reward is the mean (or sum) over the agents. The state is the root
    entry "state"; without one, all observations side by side. An agent without any available action, such as a dead
    one, has action 0. TorchRL does not say how long an episode can be, so `episode_limit` does. Raises `SettingsError`
    for an environment that does not fit.

    What is vectorized may go on beyond the end of single episodes; nothing of that is seen.

    >>> from torchrl.testing.mocking_classes import DiscreteActionVecMockEnv
    >>> TorchRLEnvironment(DiscreteActionVecMockEnv(), episode_limit=100).spec.num_actions
    7
    """

    def __init__(
        self,
        env: EnvBase,
        *,
        episode_limit: int,
        team_reward: Literal["mean", "sum"] = "mean",
        obs_key: str = "observation",
    ) -> None:
        if len(env.batch_size) > 1:
            raise SettingsError(f"one batch dimension is needed; found batch size {tuple(env.batch_size)}")
        if team_reward not in TEAM_REWARDS:
            raise SettingsError(f"there is no team reward {team_reward!r}; known are 'mean', 'sum'")
        if episode_limit < 1:
            raise SettingsError(f"an episode limit of {episode_limit} leaves no step; give at least 1")
        self._env, self._team_reward = env, TEAM_REWARDS[team_reward]
        self.batch_size = env.batch_size.numel()
        self._groups = read_groups(env, obs_key)
        self._has_state = "state" in set(env.full_observation_spec.keys())
        self._clock = Clock(self.batch_size, episode_limit)
        first = self._observed(env.fake_tensordict())
        self.spec = Spec(
            num_agents=first.obs.shape[1],
            num_actions=first.avail_actions.shape[2],
            obs_size=first.obs.shape[2],
            state_size=first.state.shape[1],
            episode_limit=episode_limit,
            obs_dtype=first.obs.dtype,
            state_dtype=first.state.dtype,
        )

    def reset(self, seed: int | None = None) -> Observation:
        """Begins B new episodes; with a seed, from there."""
        if seed is not None:
            self._env.set_seed(seed)
        self._now = self._env.reset()
        self._clock.start()
        self._last = self._observed(self._now)
        return self._last

    def step(self, actions: Tensor) -> Outcome:
        """Takes actions (B, N), int64; raises `ActionError` for others. Those of ended episodes are ignored."""
        ended = self._clock.ended
        taken = torch.from_numpy(checked_actions(actions, self._last.avail_actions, ended))
        going = ~torch.from_numpy(ended)
        reward = torch.zeros(self.batch_size)
        if going.any():
            after = self._advance(taken.masked_fill(~going[:, None], 0), going)
            reward = reward.where(~going, self._rewarded(after))
            self._clock.tick(*(self._flag(after, name).numpy() for name in ("terminated", "truncated")))
            self._last = frozen(self._last, self._observed(after), going)
        else:
            self._last = frozen(self._last, self._last, going)
        return outcome(self._last, reward.numpy(), self._clock)

    def _advance(self, taken: Tensor, going: Tensor) -> TensorDictBase:
        """What TorchRL says came next; those of its environments that can skip ended episodes are told to."""
        start = 0
        for group in self._groups:
            self._now.set(group.action, group.encoded(taken[:, start : start + group.num_agents]))
            start += group.num_agents
        if not going.all():
            self._now.set("_step", going.reshape(self._env.batch_size))
        before = self._env.step(self._now)
        after = before.get("next")
        self._now = self._env.step_mdp(before)
        return after

    def _observed(self, seen: TensorDictBase) -> Observation:
        """What a tensordict shows, in tensors that TorchRL does not write to."""
        obs = torch.cat([self._of_agents(seen, group, group.obs) for group in self._groups], dim=1)
        available = torch.cat([self._available(seen, group) for group in self._groups], dim=1)
        state = seen.get("state").reshape(self.batch_size, -1).clone() if self._has_state else obs.flatten(1)
        return Observation(obs, state, available)

    def _available(self, seen: TensorDictBase, group: Group) -> Tensor:
        if group.mask is None:
            return torch.ones(self.batch_size, group.num_agents, group.num_actions, dtype=torch.bool)
        available = self._of_agents(seen, group, group.mask).bool()
        available[..., 0] |= ~available.any(dim=2)
        return available

    def _of_agents(self, seen: TensorDictBase, group: Group, key: Key) -> Tensor:
        """One entry of a group, (B, agents, features), as a copy."""
        entry: Tensor = seen.get(key)
        return entry.reshape(self.batch_size, group.num_agents, -1).clone()

    def _rewarded(self, after: TensorDictBase) -> Tensor:
        keys = dict.fromkeys(group.reward for group in self._groups)
        rewards = torch.cat([after.get(key).reshape(self.batch_size, -1) for key in keys], dim=1)
        team_reward: Tensor = self._team_reward(rewards.float(), dim=1)
        return team_reward

    def _flag(self, after: TensorDictBase, name: str) -> Tensor:
        """Whether each episode (B,) is terminated or truncated: by the entry at the root, or else in all its agents."""
        keys = [as_tuple(key) for key in self._env.done_keys if as_tuple(key)[-1] == name]
        keys = [(name,)] if (name,) in keys else keys
        flags = [after.get(key).reshape(self.batch_size, -1) for key in keys]
        return torch.cat(flags, dim=1).all(dim=1) if flags else torch.zeros(self.batch_size, dtype=torch.bool)


def frozen(last: Observation, new: Observation, going: Tensor) -> Observation:
    """The new observation of episodes that go on (B,), and the last one of the others, with only action 0."""
    only_first = torch.zeros_like(new.avail_actions)
    only_first[..., 0] = True
    lanes = going[:, None]
    return Observation(
        obs=torch.where(lanes[..., None], new.obs, last.obs),
        state=torch.where(lanes, new.state, last.state),
        avail_actions=torch.where(lanes[..., None], new.avail_actions, only_first),
    )


class ForTorchRL(EnvBase):  # type: ignore[misc]
    """One of our environments as one of TorchRL, with its batch size (B,) and one group, "agents".

    Entries: ("agents", "observation"), ("agents", "action_mask"), ("agents", "action") as numbers, and at the root
    "state", "reward", "terminated", "truncated" and "done", each (B, 1). The action's spec is masked as the agents are,
    so that random actions are available ones. All episodes begin together, so a reset of some of them is refused
    (`SettingsError`): roll out with `break_when_all_done=True`.

    >>> from marl.environments import make_environment
    >>> tuple(ForTorchRL(make_environment("predator_prey", 4)).reset()["agents", "observation"].shape)
    (4, 8, 75)
    """

    def __init__(self, environment: Environment) -> None:
        super().__init__(batch_size=torch.Size([environment.batch_size]))
        self._environment = environment
        self._seed: int | None = None
        self._write_specs(environment.spec)

    def _write_specs(self, spec: Spec) -> None:
        lanes, agents = self.batch_size, (*self.batch_size, spec.num_agents)
        obs = Unbounded((*agents, spec.obs_size), dtype=spec.obs_dtype)
        mask = Categorical(2, shape=(*agents, spec.num_actions), dtype=torch.bool)
        of_agents = Composite(observation=obs, action_mask=mask, shape=agents)
        state = Unbounded((*lanes, spec.state_size), dtype=spec.state_dtype)
        self.observation_spec = Composite(agents=of_agents, state=state, shape=lanes)
        action = Categorical(spec.num_actions, shape=agents, dtype=torch.int64)
        self.action_spec = Composite(agents=Composite(action=action, shape=agents), shape=lanes)
        self.reward_spec = Unbounded((*lanes, 1))
        flag = Categorical(2, shape=(*lanes, 1), dtype=torch.bool)
        names = ("done", "terminated", "truncated")
        self.done_spec = Composite({name: flag.clone() for name in names}, shape=lanes)

    def _reset(self, tensordict: TensorDictBase | None = None, **_: object) -> TensorDictBase:
        asked = None if tensordict is None else tensordict.get("_reset", None)
        if asked is not None and not asked.all():
            raise SettingsError("some episodes were to begin anew, but all begin together; break when all are done")
        seed, self._seed = self._seed, None
        return self._shown(self._environment.reset(seed))

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        outcome = self._environment.step(tensordict.get(("agents", "action")))
        shown = self._shown(outcome.observation)
        done = outcome.terminated | outcome.truncated
        flags = {"terminated": outcome.terminated, "truncated": outcome.truncated, "done": done}
        return shown.update({name: value[:, None] for name, value in (flags | {"reward": outcome.reward}).items()})

    def _shown(self, observation: Observation) -> TensorDictBase:
        self.full_action_spec["agents", "action"].update_mask(observation.avail_actions)
        agents = {"observation": observation.obs, "action_mask": observation.avail_actions}
        shape = observation.obs.shape[:2]
        return TensorDict({"agents": TensorDict(agents, shape), "state": observation.state}, self.batch_size)

    def _set_seed(self, seed: int | None) -> None:
        self._seed = seed
