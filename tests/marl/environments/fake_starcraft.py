"""Clients with the interface of SMACv2's wrapper, and no StarCraft: an episode is won by the fourth step.

Observations say which process plays (its seed), which episode of it and which step, so that a test can follow them.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

LIMIT = 5
NUM_AGENTS, NUM_ACTIONS = 2, 7


class CannotResetException(Exception):
    """As SMACv2's."""


class Teams:
    """A distribution with random numbers that nobody has seeded."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng()

    def generate(self) -> dict[str, Any]:
        return {"team_gen": {"drawn": int(self.rng.integers(1000))}}


class Game:
    """What the wrapper wraps."""

    def __init__(self) -> None:
        self.drawn, self.num_episodes, self.time = 0, 0, 0

    def reset(self, drawn: dict[str, Any]) -> None:
        self.drawn, self.time = drawn["team_gen"]["drawn"], 0
        self.num_episodes += 1


class Client:
    """Always works."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments, self.env = arguments, Game()
        self.env_key_to_distribution_map = {"team_gen": Teams()}

    def get_env_info(self) -> dict[str, int]:
        sizes = {"obs_shape": 3, "state_shape": 4, "n_actions": NUM_ACTIONS, "n_agents": NUM_AGENTS}
        return {**sizes, "episode_limit": LIMIT, "cap_shape": 3}

    def get_obs(self) -> list[Any]:
        return [np.array([self.env.drawn, self.env.num_episodes, self.env.time], np.float32)] * NUM_AGENTS

    def get_state(self) -> Any:
        return np.array([*self.get_obs()[0], 1.0], np.float32)

    def get_avail_actions(self) -> list[list[int]]:
        return [[0, 1, 1, 1, 1, 1, 0]] * NUM_AGENTS

    def step(self, actions: list[int]) -> tuple[float, bool, dict[str, Any]]:
        self.env.time += 1
        is_won = self.env.time == 4 and self.env.drawn % 2 == 0
        is_late = self.env.time == LIMIT
        info = {"battle_won": is_won, "dead_allies": 0, "dead_enemies": 5 * is_won}
        return float(sum(actions)), is_won or is_late, info | ({"episode_limit": True} if is_late else {})

    def close(self) -> None:
        """Nothing is open."""


def _is_time(client: Client) -> bool:
    return client.env.num_episodes == 2 and client.env.time == 2


class LosesConnection(Client):
    """In the third step of its second episode, as the package reports it."""

    def step(self, actions: list[int]) -> tuple[float, bool, dict[str, Any]]:
        return (0, True, {}) if _is_time(self) else super().step(actions)


class Dies(Client):
    """There as well, with its process."""

    def step(self, actions: list[int]) -> tuple[float, bool, dict[str, Any]]:
        if _is_time(self):
            os._exit(1)
        return super().step(actions)


class NeverSpawns(Client):
    """No units appear, as on maps of SMAC under SMACv2."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.env.reset = self.fail  # type: ignore[method-assign]

    def fail(self, drawn: dict[str, Any]) -> None:
        raise CannotResetException


class HasNoBinary(Client):
    """StarCraft is not installed."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.env.reset = self.fail  # type: ignore[method-assign]

    def fail(self, drawn: dict[str, Any]) -> None:
        raise FileNotFoundError("~/StarCraftII/Versions")
