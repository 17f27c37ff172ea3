"""Sequences of tasks by name, after the settings of the KNIFE paper.

The paper names what drifts (payoffs; the rules and the size of predator-prey; SMACv2's races, places and numbers), but
of its tasks only the first matrix game is public. All others are ours: each sequence says what it is made of, how long
its tasks are by default, and a file of settings or the command line can say otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from marl.environments.smax_settings import POSITIONS, RACES
from marl.environments.tasks import Task

__all__ = ["SEQUENCES", "NamedSequence"]


@dataclass(frozen=True)
class NamedSequence:
    """Tasks that follow each other, and settings that fit them; nothing is built yet."""

    description: str
    """What drifts."""
    tasks: tuple[Task, ...]
    """In the order in which they are learned."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """What differs from the defaults of `marl.run_settings`, as a layer of `marl.configuring`."""


def _and_back(*tasks: Task) -> tuple[Task, ...]:
    return (*tasks, tasks[0])


def _drift(environment: str, games: Mapping[str, Mapping[str, object]], **pad: int) -> tuple[Task, ...]:
    """Variants of one environment by their names, and then the first again; sizes to be padded to."""
    return _and_back(*(Task(name, environment, options, pad=pad) for name, options in games.items()))


def _lengths(num_steps: int, exploring: int) -> dict[str, object]:
    """Steps of each task, and those until epsilon is at its least."""
    return {"training": {"num_steps": num_steps}, "learning": {"exploration": {"num_steps": exploring}}}


# Two thousand games are two thousand updates, enough for each of the five alone; records every twentieth of them.
MATRIX: dict[str, object] = {
    "training": {"num_steps": 2_000, "evaluate_every": 100, "save_every": 2_000},
    "learning": {"exploration": {"num_steps": 1_000}},
}
FIVE = tuple(
    Task(name, "matrix_game", {"payoff": name})
    # The best joint action of each is elsewhere than that of the one before, also on the way back.
    for name in ("knife", "qtran", "penalty_25", "qrelation_9", "climbing")
)
CAPTURES: Mapping[str, Mapping[str, object]] = {
    "two_leave": {"punishment": 0.0},
    "three_leave": {"punishment": 0.0, "stag_catchers": 3},
    "two_stay": {"punishment": 0.0, "capture_freezes": False},
    "three_stay": {"punishment": 0.0, "stag_catchers": 3, "capture_freezes": False},
}
GRIDS = {f"grid_{size}": {"height": size, "width": size, "punishment": 0.0} for size in (8, 10, 12)}
NUMBERS = {name: {"scenario": name} for name in ("5gen_protoss", "10gen_protoss", "10gen_protoss_vs_11")}
PREDATOR_PREY = _lengths(250_000, exploring=50_000)
SMACV2_NUMBERS = {
    f"{allies}_against_{enemies}": {"num_units": allies, "num_enemies": enemies}
    for allies, enemies in ((5, 5), (10, 10), (10, 11))
}
SMACV2 = _lengths(2_000_000, exploring=100_000)
SMAX = _lengths(500_000, exploring=50_000)

SEQUENCES: Mapping[str, NamedSequence] = {
    "matrix_five": NamedSequence("five matrix games, and the first again", _and_back(*FIVE), MATRIX),
    "matrix_stationary": NamedSequence("the first of the five alone", FIVE[:1], MATRIX),
    "predator_prey_punishment": NamedSequence(
        "what it costs when too few predators catch",
        _drift("predator_prey", {f"punishment_{cost}": {"punishment": -float(cost)} for cost in (0, 1, 2, 4)}),
        PREDATOR_PREY,
    ),
    "predator_prey_capture": NamedSequence(
        "how many have to catch a stag, and whether they leave the game with it",
        _drift("predator_prey", CAPTURES),
        PREDATOR_PREY,
    ),
    "predator_prey_hunters": NamedSequence(
        "which two of six predators get five times as much for a hare",
        _drift("predator_prey_s", {f"hunters_{seed}": {"hunter_seed": seed} for seed in (0, 1, 2)}),
        PREDATOR_PREY,
    ),
    "predator_prey_grid": NamedSequence(
        "how large the grid is; states are padded to those of the largest",
        _drift("predator_prey", GRIDS, state=3 * 12 * 12),
        PREDATOR_PREY,
    ),
    "predator_prey_stationary": NamedSequence(
        "predator-prey with punishment alone", (Task("predator_prey", "predator_prey"),), PREDATOR_PREY
    ),
    "smax_races": NamedSequence(
        "what both teams are made of, five against five on SMAX",
        _drift("smax", {race: {"scenario": f"5gen_{race}"} for race in RACES}),
        SMAX,
    ),
    "smax_positions": NamedSequence(
        "where five Protoss begin on SMAX",
        _drift("smax", {places: {"scenario": "5gen_protoss", "positions": places} for places in POSITIONS}),
        SMAX,
    ),
    "smax_numbers": NamedSequence(
        "how many Protoss fight on SMAX; smaller teams are padded with units that see and do nothing",
        _drift("smax", NUMBERS, agents=10, actions=16, obs=270, state=252),
        SMAX,
    ),
    "smacv2_races": NamedSequence(
        "what both teams are made of, five against five on StarCraft II; Terran and Zerg are padded to Protoss",
        _drift("smacv2", {race: {"race": race} for race in RACES}, obs=92, state=130),
        SMACV2,
    ),
    "smacv2_positions": NamedSequence(
        "where five Protoss begin on StarCraft II",
        _drift(
            "smacv2", {places: {"positions": places} for places in ("reflect", "surrounded", "surrounded_and_reflect")}
        ),
        SMACV2,
    ),
    "smacv2_numbers": NamedSequence(
        "how many Protoss fight on StarCraft II; smaller teams are padded with units that see and do nothing",
        _drift("smacv2", SMACV2_NUMBERS, agents=10, actions=17, obs=191, state=327),
        SMACV2,
    ),
    "smac_stationary": NamedSequence("3s_vs_5z alone, on StarCraft II", (Task("3s_vs_5z", "smac"),), SMACV2),
    "smax_stationary": NamedSequence(
        "3s_vs_5z alone, on SMAX", (Task("3s_vs_5z", "smax", {"scenario": "3s_vs_5z"}),), SMAX
    ),
}
