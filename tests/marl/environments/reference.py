"""Predator-prey as its rules say it, for one episode and in plain Python: nothing here is shared with the package.

Written from the text of the rules alone. What chance decides is decided by 64-bit words, which `draw` deals out: the
order of some things is the order of their words, and a choice among some is a word modulo 12 modulo their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from marl.environments.predator_prey_settings import PredatorPreySettings

Cell = tuple[int, int]
Draw = Callable[[int], Sequence[int]]

DIRECTIONS = {0: (0, 1), 1: (1, 0), 2: (0, -1), 3: (-1, 0)}  # right, down, left, up: (row, column)
STAY, CATCH = 4, 5


def stream(seed: int, lane: int, episode: int) -> Draw:
    """The words of the `episode`-th episode, from 1, at place `lane`, from 0, of a batch."""
    key = splitmix(splitmix(seed) + GOLDEN * (lane + 1))
    words = iterate(splitmix(key + GOLDEN * episode))
    return lambda count: [next(words) for _ in range(count)]


GOLDEN, FULL = 0x9E3779B97F4A7C15, 2**64 - 1


def iterate(state: int) -> Iterator[int]:
    while True:
        state += GOLDEN
        yield splitmix(state)


def splitmix(word: int) -> int:
    word &= FULL
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & FULL
    word = (word ^ word >> 27) * 0x94D049BB133111EB & FULL
    return word ^ word >> 31


def order_of(words: Sequence[int]) -> list[int]:
    return sorted(range(len(words)), key=lambda index: words[index])


class Game:
    """One episode of predator-prey."""

    def __init__(self, settings: PredatorPreySettings, hunters: Sequence[int], draw: Draw) -> None:
        self.settings, self.hunters, self.draw = settings, set(hunters), draw
        cells = [(row, column) for row in range(settings.height) for column in range(settings.width)]
        places = [cells[index] for index in order_of(draw(len(cells)))]
        num_agents, num_prey = settings.num_agents, settings.num_stags + settings.num_hares
        self.agents: list[Cell | None] = list(places[:num_agents])
        self.prey: list[Cell | None] = list(places[num_agents : num_agents + num_prey])
        self.time = 0
        self.terminated = self.truncated = False

    def step(self, actions: Sequence[int]) -> float:
        """The reward of one step."""
        if self.terminated or self.truncated:
            return 0.0
        agent_words, prey_words = self.draw(len(self.agents)), self.draw(len(self.prey))
        choices = [word % 12 for word in self.draw(len(self.prey))]
        for agent in order_of(agent_words):
            self.move_agent(agent, actions[agent])
        catching = {agent for agent, action in enumerate(actions) if action == CATCH}
        turns = zip(order_of(prey_words), choices, strict=True)
        reward = sum(self.turn_of(prey, catching, choice) for prey, choice in turns)
        self.time += 1
        self.terminated = not any(self.agents) or not any(self.prey)
        self.truncated = not self.terminated and self.time == self.settings.episode_limit
        return reward

    def move_agent(self, agent: int, action: int) -> None:
        cell = self.agents[agent]
        if cell is not None and action in DIRECTIONS:
            goal = neighbor(cell, action)
            if self.is_inside(goal) and not self.is_occupied(goal):
                self.agents[agent] = goal

    def turn_of(self, prey: int, catching: set[int], choice: int) -> float:
        cell = self.prey[prey]
        if cell is None:
            return 0.0
        beside = {neighbor(cell, direction) for direction in DIRECTIONS}
        catchers = [agent for agent in catching if self.agents[agent] in beside]
        is_stag = prey < self.settings.num_stags
        needed = self.settings.stag_catchers if is_stag else self.settings.hare_catchers
        if len(catchers) >= needed:
            self.prey[prey] = None
            if self.settings.capture_freezes:
                for agent in catchers:
                    self.agents[agent] = None
            return self.settings.reward_stag if is_stag else self.worth_of_hare(catchers)
        if catchers:
            return self.settings.punishment
        goals = [neighbor(cell, direction) for direction in DIRECTIONS]
        free = [goal for goal in goals if self.is_inside(goal) and not self.is_occupied(goal)]
        if free:
            self.prey[prey] = free[choice % len(free)]
        return 0.0

    def worth_of_hare(self, catchers: Sequence[int]) -> float:
        factor = self.settings.hunter_factor if self.hunters.intersection(catchers) else 1.0
        return factor * self.settings.reward_hare

    def avail_actions(self) -> list[list[bool]]:
        return [self.available(agent) for agent in self.agents]

    def available(self, agent: Cell | None) -> list[bool]:
        if agent is None:
            return [False, False, False, False, True, False]
        beside = [neighbor(agent, direction) for direction in DIRECTIONS]
        return [*(self.is_inside(cell) for cell in beside), True, any(cell in self.prey for cell in beside)]

    def obs(self) -> list[list[int]]:
        return [self.window(agent) for agent in self.agents]

    def window(self, agent: Cell | None) -> list[int]:
        radius = self.settings.obs_radius
        around = range(-radius, radius + 1)
        if agent is None:
            return [0] * (3 * len(around) ** 2)
        return [value for row in around for column in around for value in self.at((agent[0] + row, agent[1] + column))]

    def state(self) -> list[int]:
        rows, columns = range(self.settings.height), range(self.settings.width)
        return [value for row in rows for column in columns for value in self.at((row, column))]

    def at(self, cell: Cell) -> tuple[int, int, int]:
        stags, hares = self.prey[: self.settings.num_stags], self.prey[self.settings.num_stags :]
        return int(cell in self.agents), int(cell in stags), int(cell in hares)

    def is_inside(self, cell: Cell) -> bool:
        return 0 <= cell[0] < self.settings.height and 0 <= cell[1] < self.settings.width

    def is_occupied(self, cell: Cell) -> bool:
        return cell in self.agents or cell in self.prey


def neighbor(cell: Cell, direction: int) -> Cell:
    row, column = DIRECTIONS[direction]
    return cell[0] + row, cell[1] + column
