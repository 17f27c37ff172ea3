"""The parts of a step of predator-prey that happen one after the other: the predators' moves and the turns of the prey.

Each loop runs over the places of an order, with all B episodes side by side in every operation. Rules are numbered as
in `marl.environments.predator_prey`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from marl.environments.grids import NUM_NEIGHBORS, STAY, Cells, Grids
from marl.environments.predator_prey_settings import PredatorPreySettings

Bools = NDArray[np.bool_]
Numbers = NDArray[np.intp]
Counts = NDArray[np.uint8]
Floats = NDArray[np.float32]

# A number below 12 chooses evenly among 1, 2, 3 or 4 free neighbors.
NUM_CHOICES = 12
# Which neighbors are occupied and a choice make one number, below 16 * 12: the sum of these bits, plus the choice.
BITS = NUM_CHOICES * np.array([1, 2, 4, 8], dtype=np.uint8)


def escapes() -> Numbers:
    """The move for each such number, (192,): one that leads to a free neighbor, or to stay where there is none.

    >>> walled_to_the_right_and_left = BITS[0] + BITS[2]
    >>> [int(escapes()[walled_to_the_right_and_left + choice]) for choice in range(4)]
    [1, 3, 1, 3]
    """
    table = np.full((1 << NUM_NEIGHBORS, NUM_CHOICES), STAY)
    for surroundings in range(len(table) - 1):
        free = [move for move in range(NUM_NEIGHBORS) if not surroundings >> move & 1]
        table[surroundings] = [free[choice % len(free)] for choice in range(NUM_CHOICES)]
    return table.reshape(-1)


ESCAPES = escapes()


def move_predators(grids: Grids, predators: Cells, actions: Numbers, order: Numbers) -> None:
    """Rule 3: moves the predators (N, B), in place, by `actions` (N, B), one after the other of `order` (N, B)."""
    who = order * grids.batch_size + grids.lanes
    cells = predators.reshape(-1)[who]
    goals = cells + grids.deltas[actions.reshape(-1)[who]]
    for cell, goal in zip(cells, goals, strict=True):
        grids.occupied[cell] = 0
        cell[:] = np.where(grids.occupied[goal], cell, goal)
        grids.occupied[cell] = 1
    predators.reshape(-1)[who] = cells


@dataclass(frozen=True)
class Worth:
    """What catching each of the M prey takes and brings."""

    catchers: Counts
    """(M,): how many predators have to catch it at once."""
    reward: Floats
    """(M,): for capturing it."""
    reward_with_hunter: Floats
    """(M,): for capturing it with a hunter among the catchers."""
    is_hunter: Bools
    """(N,): which predators are hunters."""
    punishment: float
    """For trying with too few."""
    freezes: bool
    """Whether the catchers of a captured prey are removed."""

    @classmethod
    def of(cls, settings: PredatorPreySettings) -> Worth:
        """The worth of the stags and then the hares of these settings."""
        numbers, stag, hare = (settings.num_stags, settings.num_hares), settings.reward_stag, settings.reward_hare
        return cls(
            catchers=np.repeat(np.array([settings.stag_catchers, settings.hare_catchers], np.uint8), numbers),
            reward=np.repeat(np.array([stag, hare], np.float32), numbers),
            reward_with_hunter=np.repeat(np.array([stag, hare * settings.hunter_factor], np.float32), numbers),
            is_hunter=np.isin(np.arange(settings.num_agents), settings.hunters),
            punishment=settings.punishment,
            freezes=settings.capture_freezes,
        )


class Hunt:
    """Rule 4 in one step of B episodes.

    `predators` (N, B) and `prey` (M, B) are cells and change in place. `catching` (N, B), bool, tells who chose to
    catch, and changes where catchers are removed; `adjacent` (N, M, B), bool, tells who stands beside which prey.
    """

    def __init__(self, grids: Grids, worth: Worth, predators: Cells, prey: Cells) -> None:
        self._grids, self._worth = grids, worth
        self._predators, self._prey = predators, prey

    def run(self, catching: Bools, adjacent: Bools, order: Numbers, choices: Counts, resting: Bools) -> Floats:
        """The reward (B,) of giving the prey its turns in `order` (M, B).

        Where it flees, `choices` (M, B), below 12, are the ways it takes; where `resting` (B,), it stays.
        """
        self._catching, self._adjacent = catching, adjacent
        self._num_catchers = count_over_first(catching[:, None] & adjacent)  # (M, B); those removed no longer count
        self._reward = np.zeros(len(resting), dtype=np.float32)
        who = order * len(resting) + self._grids.lanes  # entries of flattened (M, B)
        needed, found = self._worth.catchers[order], np.empty(order.shape, np.uint8)
        num_catchers = self._num_catchers.reshape(-1)
        for turn, entries in enumerate(who):
            count = found[turn] = num_catchers[entries]
            captured = count >= needed[turn]
            if np.count_nonzero(captured):
                self._capture(order[turn][captured], captured.nonzero()[0])
            self._flee(entries, choices[turn], (count > 0) | resting)
        failures = count_over_first((found > 0) & (found < needed))
        return self._reward + self._worth.punishment * failures.astype(np.float32)

    def _capture(self, prey: Numbers, lanes: Numbers) -> None:
        """Removes one prey in each of these episodes, and its catchers where captures freeze."""
        catchers = self._catching[:, lanes] & self._adjacent[:, prey, lanes]  # (N, captures)
        with_hunter = catchers[self._worth.is_hunter].any(axis=0)
        self._reward[lanes] += np.where(with_hunter, self._worth.reward_with_hunter[prey], self._worth.reward[prey])
        self._grids.remove(self._prey, prey, lanes)
        if self._worth.freezes:
            agents, captures = catchers.nonzero()
            self._grids.remove(self._predators, agents, lanes[captures])
            self._catching[agents, lanes[captures]] = False
            self._num_catchers[:, lanes] -= count_over_first(catchers[:, None] & self._adjacent[:, :, lanes])

    def _flee(self, who: Numbers, choice: Counts, stuck: Bools) -> None:
        """Moves one prey in each episode, the entries `who` of the flattened cells, to a free neighboring cell."""
        grids, occupied, prey = self._grids, self._grids.occupied, self._prey.reshape(-1)
        cell = prey[who]
        surroundings = BITS @ occupied[cell + grids.neighbors]
        direction = ESCAPES[surroundings + choice]
        direction[stuck] = STAY
        occupied[cell] = 0
        cell += grids.deltas[direction]
        occupied[cell] = 1
        prey[who] = cell


def count_over_first(flags: Bools) -> Counts:
    """How many of the first axis are true."""
    counts: Counts = np.add.reduce(flags.view(np.uint8), axis=0, dtype=np.uint8)
    return counts
