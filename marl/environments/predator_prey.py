"""Predator-prey on a bounded grid, B episodes at once: predators have to catch together what one cannot catch.

The rules (Boehmer, Kurin and Whiteson 2020, section 6, and what the public code of that paper adds to them):

1. Predators, stags and hares start on random distinct cells.
2. A predator moves right, down, left, up, stays, or catches. It can move wherever there is no wall, and catch only
   beside a prey (4-adjacent).
3. In a step the predators move first, one after the other in a random order; whoever is in the way, blocks.
4. Then every prey has its turn, in a random order. Its catchers are the predators beside it that chose to catch. With
   enough of them (2 for a stag, 1 for a hare) it is captured: the team is rewarded, the prey is removed, and if
   captures freeze, its catchers are removed too, *at once*, so that they neither count for nor are punished at the next
   prey, and their cells are free. With too few of them the team is punished, once for this prey, so one catcher beside
   two prey is punished twice. Without any, the prey moves to a random free neighboring cell.
5. A frozen predator sees nothing and can only stay. The episode terminates when no prey or no predator is left.

A capture takes an adjacent catcher, so that the public code's option against prey capturing prey has no effect here.
One difference: an episode that ends by rule 5 in the very step of its time limit is terminated, not truncated.

Whoever chose to catch does not move, and a prey moves only after its own turn has come: who stands beside whom at a
prey's turn is known as soon as the actions are. One after the other happens only what depends on the order.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from marl.environments.draws import Streams, shuffled
from marl.environments.grids import CATCH, NUM_CHANNELS, NUM_NEIGHBORS, STAY, Grids
from marl.environments.hunting import NUM_CHOICES, Bools, Floats, Hunt, Worth, move_predators
from marl.environments.predator_prey_settings import PredatorPreySettings
from marl.environments.protocol import Clock, Observation, Outcome, Spec, checked_actions, checked_batch_size, outcome

NUM_ACTIONS = 6
ONLY_STAY = np.arange(NUM_ACTIONS) == STAY


class PredatorPrey:
    """B games of predator-prey in lockstep.

    Observations are uint8: (B, N, (2 obs_radius + 1)^2 * 3), the square around each agent, row by row, in each cell
    whether there is an agent, a stag, a hare; the state is (B, height * width * 3), the whole grid in the same way.
    Actions: right, down, left, up, stay, catch. After an episode's end only `stay` is available.
    The same seed and actions give the same episodes, and episode b of a batch does not depend on the batch's size.

    >>> game = PredatorPrey(PredatorPreySettings(height=2, width=4, num_agents=2, num_stags=1), batch_size=3)
    >>> tuple(game.reset(seed=1).obs.shape)
    (3, 2, 75)
    >>> print(game.text(episode=2))
    . . . S
    . A . A
    """

    def __init__(self, settings: PredatorPreySettings, batch_size: int, *, seed: int = 0) -> None:
        self.settings = settings
        self.batch_size = checked_batch_size(batch_size)
        self.spec = Spec(
            num_agents=settings.num_agents,
            num_actions=NUM_ACTIONS,
            obs_size=(2 * settings.obs_radius + 1) ** 2 * NUM_CHANNELS,
            state_size=settings.height * settings.width * NUM_CHANNELS,
            episode_limit=settings.episode_limit,
            obs_dtype=torch.uint8,
            state_dtype=torch.uint8,
        )
        self._streams = Streams(batch_size, seed)
        self._grids = Grids(settings.height, settings.width, batch_size, settings.obs_radius)
        self._channels = np.repeat(range(NUM_CHANNELS), [settings.num_agents, settings.num_stags, settings.num_hares])
        self._worth = Worth.of(settings)
        self._possible_moves = possible_moves(self._grids)
        self._clock = Clock(batch_size, settings.episode_limit)

    def reset(self, seed: int | None = None) -> Observation:
        """Begins B new episodes; with a seed from there, without one going on with the random numbers in use."""
        num_agents, cells = self.settings.num_agents, self.settings.height * self.settings.width
        self._streams.begin(seed)
        places = shuffled(self._streams.draw(cells))[:, : len(self._channels)]
        positions = self._grids.cells(places).T.copy()
        self._grids.clear()
        self._grids.place(positions)
        self._positions = positions  # (N + M, B): cells
        self._predators, self._prey = positions[:num_agents], positions[num_agents:]  # written to in place
        self._clock.start()
        return self._observe(self._clock.ended)

    def step(self, actions: Tensor) -> Outcome:
        """Takes actions (B, N), int64, in all episodes; those of ended episodes are ignored.

        Raises `ActionError` for the wrong shape, a type that is no integer, and for actions that are not available.
        """
        ended = self._clock.ended
        taken = np.where(ended[:, None], STAY, checked_actions(actions, self._avail_actions, ended)).T
        reward = self._play(taken, ended)
        self._clock.tick(self._is_over())
        return outcome(self._observe(ended), reward, self._clock)

    def _play(self, taken: NDArray[np.int64], ended: Bools) -> Floats:
        """The reward (B,) of the actions (N, B)."""
        num_agents, num_prey = self.settings.num_agents, self.settings.num_prey
        words = self._streams.draw(num_agents + 2 * num_prey)
        move_predators(self._grids, self._predators, taken, shuffled(words[:, :num_agents]).T)
        hunt = Hunt(self._grids, self._worth, self._predators, self._prey)
        order = shuffled(words[:, num_agents:-num_prey]).T
        choices = (words[:, -num_prey:] % NUM_CHOICES).T.astype(np.uint8)
        return hunt.run(taken == CATCH, self._adjacent, order, choices, resting=ended)

    def _is_over(self) -> Bools:
        no_predator = (self._predators == self._grids.nowhere).all(axis=0)
        over: Bools = no_predator | (self._prey == self._grids.nowhere).all(axis=0)
        return over

    def _observe(self, ended: Bools) -> Observation:
        """What can be seen, with no action but staying in episodes that ended before the last step."""
        grids = self._grids
        grids.draw(self._positions, self._channels)
        self._adjacent = grids.adjacent(self._predators, self._prey)  # (N, M, B)
        available = self._possible_moves.take((self._predators - grids.nowhere).T, axis=0)
        available[..., CATCH] = self._adjacent.any(axis=1).T
        available[ended] = ONLY_STAY
        self._avail_actions = torch.from_numpy(available)
        obs, state = torch.from_numpy(grids.windows(self._predators)), torch.from_numpy(grids.whole())
        return Observation(obs, state, self._avail_actions)

    def text(self, episode: int = 0) -> str:
        """The grid of one episode, for people: predators A, stags S, hares H, removed animals nowhere."""
        return self._grids.text(episode, "ASH")


def possible_moves(grids: Grids) -> Bools:
    """What an agent at each cell of a grid can do when no prey is beside it, (size, A); nowhere, it can stay."""
    possible = np.tile(ONLY_STAY, (grids.size, 1))
    possible[:, :NUM_NEIGHBORS] = ~grids.walls_around()
    possible[0] = ONLY_STAY
    return possible
