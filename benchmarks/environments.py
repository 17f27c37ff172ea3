"""How fast the environments are alone: against the rules in plain Python, and over sizes.

The first table sets B episodes in lockstep against one episode of the reference that the tests compare them with: a
plain implementation of the same rules, step by step from their text. Both hand out observations, state and available
actions after every step, and choosing actions counts for neither. They take turns in one run, each for a stretch of its
own; what is printed are medians of the ratios of neighboring stretches, with their quartiles. Time is that of the
process, so that others on the same machine do not count.

For orientation, not measured here: the public implementations of these games run at about 200 steps a second. The
reference searches lists, as the text of the rules suggests; with sets, and rows copied at once, plain Python came to
about three times its speed.

    python -m benchmarks.environments
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from marl.environments import Environment, Observation, PredatorPreySettings, make_environment
from marl.environments.predator_prey_settings import VARIANTS
from tests.marl.environments import reference
from tests.marl.environments.playing import uniform_actions

NUM_TURNS = 41
NUM_STEPS = 20  # of a turn of either
COMPARED = ["predator_prey", "predator_prey_s", "predator_prey_m", "predator_prey_l"]
BATCH_SIZES = [1, 8, 64, 512]
TEAMS = [4, 8, 16]
GRIDS = [8, 10, 20]


def main() -> None:
    """Measure and print both tables."""
    torch.set_num_threads(1)
    console = Console()
    console.print(against_the_reference())
    console.print(over_sizes())


def against_the_reference(batch_size: int = 64) -> Table:
    """Steps per second of both, and their ratio."""
    title = f"B = {batch_size} in lockstep against plain Python, steps/s"
    table = Table("environment", "reference", "vectorized", "vectorized / reference", title=title)
    for name in COMPARED:
        one, many = OneGame(VARIANTS[name]), ManyGames(make_environment(name, batch_size))
        pairs = [(one.turn() / NUM_STEPS, many.turn() / (NUM_STEPS * batch_size)) for _ in range(1 + NUM_TURNS)][1:]
        singles, batches = zip(*pairs, strict=True)
        ratios = [single / batch for single, batch in pairs]
        table.add_row(name, per_second(singles), per_second(batches), spread(ratios))
    return table


def over_sizes() -> Table:
    """Steps per second of predator-prey over B, agents (with as many stags) and grid."""
    table = Table(
        "agents", "grid", *(f"B = {batch_size}" for batch_size in BATCH_SIZES), title="predator_prey, steps/s"
    )
    for team in TEAMS:
        for grid in GRIDS:
            cells = [measured(batch_size, team, grid) for batch_size in BATCH_SIZES]
            table.add_row(str(team), f"{grid} x {grid}", *cells)
    return table


def measured(batch_size: int, team: int, grid: int) -> str:
    """The median steps per second of one size."""
    sizes = {"num_agents": team, "num_stags": team, "height": grid, "width": grid}
    games = ManyGames(make_environment("predator_prey", batch_size, **sizes))
    games.turn()
    return per_second([games.turn() / (NUM_STEPS * batch_size) for _ in range(NUM_TURNS // 4)])


class ManyGames:
    """B episodes in lockstep, played by the uniform policy and begun anew at the time limit."""

    def __init__(self, environment: Environment) -> None:
        self.environment = environment
        self.generator = torch.Generator().manual_seed(0)
        self.begin()

    def begin(self) -> None:
        """Begins B episodes."""
        self.observation: Observation = self.environment.reset()
        self.num_steps = 0

    def turn(self) -> float:
        """Seconds of the environment for `NUM_STEPS` steps of all episodes, resets included."""
        return sum(self.step() for _ in range(NUM_STEPS))

    def step(self) -> float:
        """Seconds of one step of all episodes."""
        seconds = timed(self.begin) if self.num_steps == self.environment.spec.episode_limit else 0.0
        actions = uniform_actions(self.observation.avail_actions, self.generator)
        self.num_steps += 1

        def play() -> None:
            self.observation = self.environment.step(actions).observation

        return seconds + timed(play)


class OneGame:
    """One episode after the other of the reference, played by the uniform policy."""

    def __init__(self, settings: PredatorPreySettings) -> None:
        self.settings = settings
        self.random = random.Random(0)
        self.num_games = 0
        self.begin()

    def begin(self) -> None:
        """Begins an episode."""
        self.num_games += 1
        stream = reference.stream(seed=0, lane=0, episode=self.num_games)
        self.game = reference.Game(self.settings, self.settings.hunters, stream)
        self.observe()

    def observe(self) -> None:
        """Lays out what can be seen."""
        self.seen = (self.game.obs(), self.game.state())
        self.avail_actions = self.game.avail_actions()

    def turn(self) -> float:
        """Seconds of the game for `NUM_STEPS` steps, resets included."""
        return sum(self.step() for _ in range(NUM_STEPS))

    def step(self) -> float:
        """Seconds of one step."""
        seconds = timed(self.begin) if self.game.terminated or self.game.truncated else 0.0
        actions = [self.random.choice([a for a in range(6) if flags[a]]) for flags in self.avail_actions]

        def play() -> None:
            self.game.step(actions)
            self.observe()

        return seconds + timed(play)


def timed(work: Callable[[], None]) -> float:
    """The processor's seconds for some work."""
    start = time.process_time()
    work()
    return time.process_time() - start


def per_second(seconds: list[float] | tuple[float, ...]) -> str:
    """The median rate."""
    return f"{1 / statistics.median(seconds):,.0f}"


def spread(ratios: list[float]) -> str:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(ratios, n=4)
    return f"{median:.0f} ({low:.0f} to {high:.0f})"


if __name__ == "__main__":
    main()
