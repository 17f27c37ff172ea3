"""The endless predator-prey of QTRAN (Son et al. 2019, section 5.3), B episodes at once: no catching, only closing in.

The rules, with what the public code adds to the paper's:

1. Predators and prey start on random distinct cells of a bounded grid. Every animal moves right, down, left, up, or
   stays, prey by chance; no move is ever unavailable, one against a wall or another animal is a stay.
2. In a step the predators move in the order of their numbers, then the prey. Who is about to enter the cell of an
   animal that has still to move lets that one go first, and it the next one, until one is not in the way of another.
3. Then every prey beside two or more predators (4-adjacent) is captured, for a reward of 1, and one beside a single
   predator costs the penalty. The team's reward is their sum divided by the number of predators.
4. The captured prey, one after the other, goes on at a random free cell. Only the time limit ends an episode.

Two differences: the public code shows agents the grid of before rule 4, here they see what is; and it stacks the last
few views, which is left to the memory of the agents.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from marl.environments.checking import require_at_least, require_types_of_defaults
from marl.environments.draws import Streams, Words, shuffled
from marl.environments.grids import NUM_CHANNELS, STAY, Grids
from marl.environments.protocol import Clock, Observation, Outcome, Spec, checked_actions, checked_batch_size, outcome
from marl.errors import SettingsError

Numbers = NDArray[np.intp]
NUM_ACTIONS = 5
AGENT, PREY, WALL = range(NUM_CHANNELS)
# What stands on a cell: the number of an animal, or one of these.
FREE, WALLED = -1, -2
ONLY_STAY = np.arange(NUM_ACTIONS) == STAY


@dataclass(frozen=True)
class QtranPredatorPreySettings:
    """The size of the grid, who lives on it, and what closing in is worth.

    Raises `SettingsError` for settings that make no game.
    """

    height: int = 7
    """Rows of the bounded grid."""
    width: int = 7
    """Columns of the grid."""
    num_agents: int = 4
    """Predators."""
    num_prey: int = 2
    """Prey."""
    obs_radius: int = 1
    """An agent sees the square of 2 radius + 1 cells around it."""
    episode_limit: int = 100
    """Steps of an episode."""
    penalty: float = 0.5
    """The paper's P: what a prey beside one predator alone costs."""

    def __post_init__(self) -> None:
        require_types_of_defaults(self)
        require_at_least(self, 1, "height", "width", "num_agents", "num_prey", "obs_radius", "episode_limit")
        require_at_least(self, 0, "penalty")
        animals, cells = self.num_agents + self.num_prey, self.height * self.width
        if animals >= cells:
            raise SettingsError(f"{animals} animals leave no cell free of {cells}; enlarge the grid or take fewer")


QTRAN_VARIANTS = {
    "qtran_predator_prey": QtranPredatorPreySettings(),
    "qtran_predator_prey_small": QtranPredatorPreySettings(height=5, width=5, num_agents=2, num_prey=1),
}


class QtranPredatorPrey:
    """B games of QTRAN's predator-prey in lockstep.

    Observations are uint8: (B, N, (2 obs_radius + 1)^2 * 3), the square around each agent, row by row, in each cell
    whether there is an agent, a prey, a wall; the state is (B, height * width * 2), agents and prey in the whole grid.
    Actions: right, down, left, up, stay. Episodes are seeded as in `PredatorPrey`.

    >>> game = QtranPredatorPrey(QtranPredatorPreySettings(), batch_size=3)
    >>> tuple(game.reset(seed=1).obs.shape)
    (3, 4, 27)
    """

    def __init__(self, settings: QtranPredatorPreySettings, batch_size: int, *, seed: int = 0) -> None:
        self.settings = settings
        self.batch_size = checked_batch_size(batch_size)
        self.spec = Spec(
            num_agents=settings.num_agents,
            num_actions=NUM_ACTIONS,
            obs_size=(2 * settings.obs_radius + 1) ** 2 * NUM_CHANNELS,
            state_size=settings.height * settings.width * WALL,
            episode_limit=settings.episode_limit,
            obs_dtype=torch.uint8,
            state_dtype=torch.uint8,
        )
        self._streams = Streams(batch_size, seed)
        self._grids = Grids(settings.height, settings.width, batch_size, settings.obs_radius)
        self._channels = np.repeat([AGENT, PREY], [settings.num_agents, settings.num_prey])
        self._clock = Clock(batch_size, settings.episode_limit)

    def reset(self, seed: int | None = None) -> Observation:
        """Begins B new episodes; with a seed from there, without one going on with the random numbers in use."""
        self._streams.begin(seed)
        places = shuffled(self._streams.draw(self.settings.height * self.settings.width))[:, : len(self._channels)]
        self._grids.clear(shown_walls=WALL)
        self._positions = self._grids.cells(places).T.copy()  # (N + M, B): the cells of the predators, then the prey
        self._occupants = np.where(self._grids.occupied, WALLED, FREE)
        self._occupants[self._positions] = np.arange(len(self._channels))[:, None]
        self._clock.start()
        return self._observe(self._clock.ended)

    def step(self, actions: Tensor) -> Outcome:
        """Takes actions (B, N), int64; raises `ActionError` for others. Past the time limit nothing happens."""
        ended = self._clock.ended
        taken = checked_actions(actions, self._avail_actions, ended)
        reward = np.zeros(self.batch_size, dtype=np.float32)
        if not ended.any():  # all end at the time limit
            reward = self._play(taken.T)
        self._clock.tick(np.zeros(self.batch_size, dtype=np.bool_))
        return outcome(self._observe(ended), reward, self._clock)

    def _play(self, taken: NDArray[np.int64]) -> NDArray[np.float32]:
        """The reward (B,) of the predators' actions (N, B)."""
        settings = self.settings
        words = self._streams.draw(2 * settings.num_prey).T
        moves = (words[: settings.num_prey] % NUM_ACTIONS).astype(np.int64)
        self._move_all(np.concatenate([taken, moves]))
        predators, prey = np.split(self._positions, [settings.num_agents])
        num_beside = self._grids.adjacent(predators, prey).sum(axis=0)  # (M, B)
        captured = num_beside >= 2
        for index in range(settings.num_prey):
            lanes = captured[index].nonzero()[0]
            self._respawn(settings.num_agents + index, lanes, words[settings.num_prey + index, lanes])
        total = captured.sum(axis=0) - settings.penalty * (num_beside == 1).sum(axis=0)
        reward: NDArray[np.float32] = (total / settings.num_agents).astype(np.float32)
        return reward

    def _move_all(self, moves: NDArray[np.int64]) -> None:
        """Rule 2: moves all animals by `moves` (N + M, B)."""
        self._goals = self._positions + self._grids.deltas[moves]
        self._has_moved = np.zeros(moves.shape, dtype=np.bool_)
        for first in range(len(moves)):
            for animals, lanes in reversed(self._queue(first)):
                self._move(animals, lanes)

    def _queue(self, first: int) -> list[tuple[Numbers, Numbers]]:
        """Who waits for whom before `first` can move: that animal, the one in its way, the one in that one's way.

        One entry for each place in the queue: the animals there, and the episodes in which the queue is so long.
        """
        lanes = (~self._has_moved[first]).nonzero()[0]
        animals = np.full(len(lanes), first)
        is_waiting = np.zeros(self._has_moved.shape, dtype=np.bool_)
        queue = []
        while len(lanes):
            queue.append((animals, lanes))
            is_waiting[animals, lanes] = True
            ahead = self._occupants[self._goals[animals, lanes]]
            goes_first = (ahead >= 0) & ~self._has_moved[ahead, lanes] & ~is_waiting[ahead, lanes]
            animals, lanes = ahead[goes_first], lanes[goes_first]
        return queue

    def _move(self, animals: Numbers, lanes: Numbers) -> None:
        """Moves one animal in each of these episodes, if its goal is free by now."""
        self._has_moved[animals, lanes] = True
        is_free = self._occupants[self._goals[animals, lanes]] == FREE
        animals, lanes = animals[is_free], lanes[is_free]
        self._put(animals, lanes, self._goals[animals, lanes])

    def _respawn(self, animal: int, lanes: Numbers, words: Words) -> None:
        """Rule 4: puts one animal to a random free cell of each of these episodes."""
        free = self._occupants.reshape(self.batch_size, -1)[lanes] == FREE
        which = words % free.sum(axis=1).astype(np.uint64)
        cells = (free.cumsum(axis=1) > which[:, None]).argmax(axis=1)
        self._put(np.full(len(lanes), animal), lanes, self._grids.nowhere[lanes] + cells)

    def _put(self, animals: Numbers, lanes: Numbers, cells: Numbers) -> None:
        self._occupants[self._positions[animals, lanes]] = FREE
        self._occupants[cells] = animals
        self._positions[animals, lanes] = cells

    def _observe(self, ended: NDArray[np.bool_]) -> Observation:
        """What can be seen, with no action but staying in episodes that ended before the last step."""
        self._grids.draw(self._positions, self._channels)
        available = np.ones((self.batch_size, self.settings.num_agents, NUM_ACTIONS), dtype=np.bool_)
        available[ended] = ONLY_STAY
        self._avail_actions = torch.from_numpy(available)
        obs = torch.from_numpy(self._grids.windows(self._positions[: self.settings.num_agents]))
        return Observation(obs, torch.from_numpy(self._grids.whole(num_channels=WALL)), self._avail_actions)

    def text(self, episode: int = 0) -> str:
        """The grid of one episode, for people: predators A, prey P."""
        return self._grids.text(episode, "AP")
