"""QTRAN's predator-prey as its rules say it, for one episode in plain Python; nothing is shared with the package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tests.marl.environments.reference import DIRECTIONS, Cell, Draw, neighbor, order_of

if TYPE_CHECKING:
    from marl.environments.qtran_predator_prey import QtranPredatorPreySettings


class Game:
    """One episode; animals are numbered, predators first."""

    def __init__(self, settings: QtranPredatorPreySettings, draw: Draw) -> None:
        self.settings, self.draw = settings, draw
        self.cells = [(row, column) for row in range(settings.height) for column in range(settings.width)]
        order = order_of(draw(len(self.cells)))
        self.animals: list[Cell] = [self.cells[index] for index in order[: settings.num_agents + settings.num_prey]]
        self.time = 0
        self.truncated = False

    def step(self, actions: Sequence[int]) -> float:
        num_prey = self.settings.num_prey
        moves = [*actions, *(word % 5 for word in self.draw(num_prey))]
        places = self.draw(num_prey)
        moved: set[int] = set()
        for animal in range(len(self.animals)):
            self.move(animal, moves, moved, frozenset())
        beside = [self.num_beside(cell) for cell in self.prey()]
        for prey, word in enumerate(places):
            if beside[prey] >= 2:
                free = [cell for cell in self.cells if cell not in self.animals]
                self.animals[self.settings.num_agents + prey] = free[word % len(free)]
        self.time += 1
        self.truncated = self.time == self.settings.episode_limit
        total = sum(1.0 if number >= 2 else -self.settings.penalty * (number == 1) for number in beside)
        return total / self.settings.num_agents

    def move(self, animal: int, moves: Sequence[int], moved: set[int], waiting: frozenset[int]) -> None:
        if animal in moved or animal in waiting:
            return
        if moves[animal] in DIRECTIONS:
            goal = neighbor(self.animals[animal], moves[animal])
            if goal in self.animals:
                self.move(self.animals.index(goal), moves, moved, waiting | {animal})
            if goal in self.cells and goal not in self.animals:
                self.animals[animal] = goal
        moved.add(animal)

    def prey(self) -> list[Cell]:
        return self.animals[self.settings.num_agents :]

    def num_beside(self, cell: Cell) -> int:
        agents = self.animals[: self.settings.num_agents]
        return sum(neighbor(cell, direction) in agents for direction in DIRECTIONS)

    def obs(self) -> list[list[int]]:
        around = range(-self.settings.obs_radius, self.settings.obs_radius + 1)
        return [
            [value for row in around for column in around for value in self.at((agent[0] + row, agent[1] + column))]
            for agent in self.animals[: self.settings.num_agents]
        ]

    def state(self) -> list[int]:
        return [value for cell in self.cells for value in self.at(cell)[:2]]

    def at(self, cell: Cell) -> tuple[int, int, int]:
        return (
            int(cell in self.animals[: self.settings.num_agents]),
            int(cell in self.prey()),
            int(cell not in self.cells),
        )
