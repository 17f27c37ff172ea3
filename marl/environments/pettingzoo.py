"""Our environments as parallel environments of PettingZoo, one episode at a time.

The other way round is TorchRL's `PettingZooWrapper` in `marl.environments.torchrl.TorchRLEnvironment`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from marl.environments.protocol import Observation, TextEnvironment
from marl.errors import MissingExtraError, SettingsError

try:
    from gymnasium.spaces import Box, Dict, Discrete, Space
    from pettingzoo import ParallelEnv
except ImportError as error:
    raise MissingExtraError.of("pettingzoo") from error

Seen = dict[str, dict[str, NDArray[Any]]]


class ForPettingZoo(ParallelEnv):  # type: ignore[misc]
    """One of our environments, of batch size 1, as a `ParallelEnv` of agents "agent_0", "agent_1", and so on.

    An agent observes a dictionary: "observation" (O,) and "action_mask" (A,), int8, as PettingZoo's own masked games;
    `action_space(agent).sample(mask)` draws an available action, others raise `ActionError`. Every agent gets the
    team's reward, and all leave together. `state()` is the state (S,), `render()` the text of the episode.
    Raises `SettingsError` for more than one parallel episode.

    >>> from marl.environments import make_environment
    >>> ForPettingZoo(make_environment("predator_prey", 1)).action_space("agent_7")
    Discrete(6)
    """

    metadata = {"name": "marl_v0", "render_modes": ["ansi"], "is_parallelizable": True}  # noqa: RUF012
    render_mode = "ansi"

    def __init__(self, environment: TextEnvironment) -> None:
        if environment.batch_size != 1:
            found = environment.batch_size
            raise SettingsError(f"PettingZoo plays one episode at a time; found {found}, make one with batch_size=1")
        self._environment = environment
        spec = environment.spec
        self.possible_agents = [f"agent_{index}" for index in range(spec.num_agents)]
        self.agents: list[str] = []
        self.state_space = box(spec.state_size, spec.state_dtype)
        mask = Box(0, 1, (spec.num_actions,), np.int8)
        self._observation_spaces: dict[str, Space[Any]] = {
            agent: Dict({"observation": box(spec.obs_size, spec.obs_dtype), "action_mask": mask})
            for agent in self.possible_agents
        }
        self._action_spaces = {agent: Discrete(spec.num_actions) for agent in self.possible_agents}

    def observation_space(self, agent: str) -> Space[Any]:
        """What an agent observes; the same object every time."""
        return self._observation_spaces[agent]

    def action_space(self, agent: str) -> Discrete:
        """An agent's actions; the same object every time."""
        return self._action_spaces[agent]

    def reset(
        self, seed: int | None = None, options: Mapping[str, object] | None = None
    ) -> tuple[Seen, dict[str, dict[str, object]]]:
        """Begins an episode; there are no options."""
        self.agents = list(self.possible_agents)
        return self._seen(self._environment.reset(seed)), {agent: {} for agent in self.agents}

    def step(
        self, actions: Mapping[str, int]
    ) -> tuple[Seen, dict[str, float], dict[str, bool], dict[str, bool], dict[str, dict[str, object]]]:
        """Takes the actions of all agents."""
        taken = torch.tensor([[int(actions[agent]) for agent in self.agents]])
        outcome = self._environment.step(taken)
        seen = self._seen(outcome.observation)
        reward = self._of_all(outcome.reward.item())
        infos: dict[str, dict[str, object]] = {agent: {} for agent in self.agents}
        terminated, truncated = self._of_all(bool(outcome.terminated)), self._of_all(bool(outcome.truncated))
        if outcome.terminated or outcome.truncated:
            self.agents = []
        return seen, reward, terminated, truncated, infos

    def state(self) -> NDArray[Any]:
        """The state of the episode, (S,)."""
        return self._state

    def render(self) -> str:
        """The text of the episode."""
        return self._environment.text()

    def _seen(self, observation: Observation) -> Seen:
        self._state: NDArray[Any] = observation.state[0].numpy()
        obs, masks = observation.obs[0].numpy(), observation.avail_actions[0].numpy().astype(np.int8)
        return {
            agent: {"observation": obs[index], "action_mask": masks[index]} for index, agent in enumerate(self.agents)
        }

    def _of_all(self, value: Any) -> dict[str, Any]:
        return dict.fromkeys(self.agents, value)


def box(size: int, dtype: torch.dtype) -> Box:
    """All vectors of a size and type.

    >>> box(3, torch.uint8)
    Box(0, 255, (3,), uint8)
    """
    kind = torch.empty(0, dtype=dtype).numpy().dtype
    if dtype.is_floating_point:
        return Box(-np.inf, np.inf, (size,), kind.type)
    return Box(int(np.iinfo(kind).min), int(np.iinfo(kind).max), (size,), kind.type)
