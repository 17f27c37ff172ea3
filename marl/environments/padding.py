"""Games that look larger to the networks than they are, so that one set of networks can play games of several sizes.

What is added are zeros at the end of observations and state, actions that are never available, agents that see nothing
and have action 0 alone, and room for steps that no episode takes. Nothing of the game itself changes. A grid's state is
padded like any other: its cells keep their order, not their places.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from marl.environments.protocol import Observation, Outcome, Spec, checked_actions, close
from marl.errors import SettingsError, suggestion

if TYPE_CHECKING:
    from marl.environments.protocol import TextEnvironment

__all__ = ["SIZES", "Padded", "padded_spec", "sizes"]

SIZES: Mapping[str, str] = {
    "agents": "num_agents",
    "actions": "num_actions",
    "obs": "obs_size",
    "state": "state_size",
    "steps": "episode_limit",
}
"""What a size is called in settings, and in `Spec`."""


def sizes(spec: Spec) -> dict[str, int]:
    """The sizes of a game.

    >>> sizes(Spec(num_agents=2, num_actions=3, obs_size=5, state_size=4, episode_limit=1))
    {'agents': 2, 'actions': 3, 'obs': 5, 'state': 4, 'steps': 1}
    """
    return {name: getattr(spec, field) for name, field in SIZES.items()}


def padded_spec(spec: Spec, least: Mapping[str, int]) -> Spec:
    """The sizes of a game that are to be at least as large as these.

    >>> spec = Spec(num_agents=2, num_actions=3, obs_size=5, state_size=4, episode_limit=1)
    >>> padded_spec(spec, {"state": 7}).state_size
    7

    Raises:
        SettingsError: unknown sizes, no whole numbers, or less than the game's own.
    """
    for name, size in least.items():
        if name not in SIZES:
            raise SettingsError(f"pad has no size {name!r}; {suggestion(name, SIZES)}")
        found = getattr(spec, SIZES[name])
        if type(size) is not int or size < found:
            raise SettingsError(f"pad.{name} is {size!r}; the game has {found}: give a whole number of at least that")
    changes: dict[str, int] = {SIZES[name]: size for name, size in least.items()}
    return replace(spec, **changes)  # type: ignore[arg-type]  # no field of another type is among them


class Padded:
    """An environment with larger sizes than its own.

    >>> from marl.environments.registry import make_environment
    >>> game = Padded(make_environment("matrix_game", 2), {"agents": 3, "state": 8})
    >>> seen = game.reset()
    >>> seen.state[0].tolist(), seen.avail_actions[0, 2].tolist()
    ([1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0], [True, False, False])

    Raises:
        SettingsError: sizes that are less than the game's own.
    """

    def __init__(self, environment: TextEnvironment, least: Mapping[str, int]) -> None:
        self._environment = environment
        self.batch_size = environment.batch_size
        self.spec = padded_spec(environment.spec, least)

    def reset(self, seed: int | None = None) -> Observation:
        """Begins B new episodes; with a seed from there, without one going on with the random numbers in use."""
        self._ended = torch.zeros(self.batch_size, dtype=torch.bool)
        return self._padded(self._environment.reset(seed))

    def step(self, actions: Tensor) -> Outcome:
        """Takes actions (B, N), int64; raises `ActionError` for others. Those of ended episodes are ignored."""
        taken = torch.from_numpy(checked_actions(actions, self._avail_actions, self._ended.numpy()))
        found = self._environment.step(taken[:, : self._environment.spec.num_agents])
        self._ended = found.terminated | found.truncated
        return replace(found, observation=self._padded(found.observation))

    def text(self, episode: int = 0) -> str:
        """What the game itself shows of one episode."""
        return self._environment.text(episode)

    def close(self) -> None:
        """Close the game."""
        close(self._environment)

    def _padded(self, seen: Observation) -> Observation:
        own, spec = self._environment.spec, self.spec
        agents, actions = spec.num_agents - own.num_agents, spec.num_actions - own.num_actions
        self._avail_actions = pad(seen.avail_actions, (0, actions, 0, agents))
        self._avail_actions[:, own.num_agents :, 0] = True
        obs = pad(seen.obs, (0, spec.obs_size - own.obs_size, 0, agents))
        return Observation(obs, pad(seen.state, (0, spec.state_size - own.state_size)), self._avail_actions)
