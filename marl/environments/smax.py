"""SMAX, from JaxMARL: StarCraft's micromanagement compiled by JAX, many battles side by side.

It needs the extra `smax`, but only when a game is made. What differs from SMAC and SMACv2 is in `docs/smax.md`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from marl.environments.protocol import Clock, Observation, Outcome, Spec, checked_actions, checked_batch_size, outcome
from marl.environments.smax_settings import STOP, SmaxSettings
from marl.errors import CheckpointError

if TYPE_CHECKING:
    from marl.environments.smax_games import Lanes

__all__ = ["Smax"]

MASK = 2**32 - 1
ROWS, COLUMNS = 16, 32
"""Of the picture of a battle."""


class Smax:
    """B battles of a team that learns against SMAX's rule: shoot the closest in range, else go for someone in sight.

    Actions are north, east, south, west, stop (all that the dead can do), and to shoot each of the enemies. An episode
    is terminated when a team is dead, and won when only the enemies are; it is truncated after `episode_limit` steps.
    All agents share one reward, also the dead. The first battle of each number of parallel episodes is compiled, which
    takes some 10 seconds of the CPU, or 2 where JAX remembers it.

    Raises:
        MissingExtraError: JaxMARL is not installed.
        SettingsError: no such scenario.
    """

    def __init__(self, settings: SmaxSettings, batch_size: int, *, seed: int = 0) -> None:
        from marl.environments.smax_games import games_of  # here, so that nobody else waits for JAX

        self.batch_size = checked_batch_size(batch_size)
        self._games = games_of(settings)
        self._reward_scale = np.float32(settings.reward_scale)
        self._state_scales = self._games.state_scales if settings.scaled_state else np.float32(1)
        self.spec = Spec(
            num_agents=self._games.num_agents,
            num_actions=self._games.num_actions,
            obs_size=self._games.obs_size,
            state_size=self._games.state_size,
            episode_limit=settings.episode_limit,
        )
        self._seed, self._num_begun = seed, 0
        self._clock = Clock(batch_size, settings.episode_limit)

    def reset(self, seed: int | None = None) -> Observation:
        """Begins B new episodes; with a seed from there, without one going on with the random numbers in use."""
        if seed is not None:
            self._seed, self._num_begun = seed, 0
        words = np.array([self._seed >> 32 & MASK, self._seed & MASK], dtype=np.uint32)  # as JAX lays out a seed
        self._lanes: Lanes = self._games.begin(words, self.batch_size, np.uint32(self._num_begun))
        self._num_begun += 1
        self._won = np.zeros(self.batch_size, dtype=np.bool_)
        self._clock.start()
        return self._observe(self._clock.ended)

    def step(self, actions: Tensor) -> Outcome:
        """Takes actions (B, N), int64; raises `ActionError` for others. Those of ended episodes are ignored."""
        ended = self._clock.ended
        taken = checked_actions(actions, self._avail_actions, ended)
        reward = np.zeros(self.batch_size, dtype=np.float32)
        if not ended.all():
            only_stop = np.where(ended[:, None], STOP, taken).astype(np.int32)
            after = self._games.step(self._lanes, only_stop, ~ended)
            self._lanes, reward = after.lanes, np.asarray(after.reward) * self._reward_scale
            self._won = np.where(ended, self._won, after.is_won)
            self._clock.tick(np.asarray(after.is_over))
        return outcome(self._observe(ended), reward, self._clock, won=self._won)

    def text(self, episode: int = 0) -> str:
        """One battlefield, allies as A and enemies as E, and the health of all, for people."""
        state = self._lanes.state.state
        places, alive, health, types = (
            np.asarray(value)[episode]
            for value in (state.unit_positions, state.unit_alive, state.unit_health, state.unit_types)
        )
        grid = [["."] * COLUMNS for _ in range(ROWS)]
        for number in np.flatnonzero(alive):
            x, y = places[number] / self._games.map_size
            row, column = int((1 - y) * ROWS), int(x * COLUMNS)
            grid[min(max(row, 0), ROWS - 1)][min(max(column, 0), COLUMNS - 1)] = self._letter(number)
        units = [
            f"{self._letter(number)} {self._games.unit_names[kind]} {left:.0f}"
            for number, (kind, left) in enumerate(zip(types, health, strict=True))
        ]
        return "\n".join([*("".join(row) for row in grid), ", ".join(units)])

    def state_dict(self) -> dict[str, Any]:
        """Where all episodes stand, with their random numbers: tensors and numbers, for `torch.save`.

        A run that is saved between two rollouts has no need of it, because every rollout begins with a seed.
        """
        return {
            "clock": self._clock.state_dict(),
            "seed": self._seed,
            "num_begun": self._num_begun,
            "won": self._won.tolist(),
            "avail_actions": self._avail_actions,
            "lanes": [torch.from_numpy(leaf) for leaf in self._games.leaves(self._lanes)],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on in the middle of saved episodes.

        Raises:
            CheckpointError: they are of other sizes, or of another number.
        """
        lanes, expected = [leaf.numpy() for leaf in state["lanes"]], self._games.layout(self.batch_size)
        if (found := [(leaf.shape, leaf.dtype) for leaf in lanes]) != expected:
            both = f"asked to go on with {self.batch_size} episodes of {expected}, found {found}"
            raise CheckpointError(f"{both}: use the scenario and the number of episodes that they were saved with")
        self._lanes = self._games.with_leaves(lanes)
        self._seed, self._num_begun = state["seed"], state["num_begun"]
        self._won, self._avail_actions = np.array(state["won"]), state["avail_actions"]
        self._clock.load_state_dict(state["clock"])

    @property
    def num_programs(self) -> int:
        """How many functions were compiled for these battles, whatever their number, in this process."""
        return self._games.num_programs

    def _observe(self, ended: NDArray[np.bool_]) -> Observation:
        """What can be seen now; episodes that had ended before (B,) have nothing left to do."""
        available = np.array(self._lanes.avail_actions)
        available[ended] = np.arange(self.spec.num_actions) == STOP
        self._avail_actions = torch.from_numpy(available)
        obs, state = np.array(self._lanes.obs), np.asarray(self._lanes.world) * self._state_scales
        return Observation(torch.from_numpy(obs), torch.from_numpy(state), self._avail_actions)

    def _letter(self, number: int | np.signedinteger[Any]) -> str:
        return "A" if number < self.spec.num_agents else "E"
