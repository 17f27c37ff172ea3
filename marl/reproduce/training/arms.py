"""The games of whole runs, what is done about lost plasticity in them, and what is measured.

Nothing was tuned here: learner and budget are those with which QMIX was seen to learn (docs/smax.md), and methods have
the settings of their papers or the plainest reading of them. At the smallest scale predator-prey on a tiny grid takes
the place of battles, which need JAX.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from marl.reproduce.figures.arms import FRESH, ONE_IN_TWENTY
from marl.reproduce.figures.figure import Asked, Measure, Scale
from marl.reproduce.training.runs import TrainingRun

__all__ = [
    "BATTLES",
    "DRIFTS",
    "HUNTS",
    "STATIONARY",
    "Compared",
    "Games",
    "arms_of_drift",
    "arms_of_stationary",
    "at_ends",
    "measures_of_drift",
    "measures_of_stationary",
]

Intervention = tuple[str, ...]
"""Settings, as `--set` takes them."""

KNIFE, RANDOM = "KNIFE, the paper's reading", "KNIFE, a tenth at random"
FEWEST = ("none", "optimizer reset", FRESH, KNIFE, "ReDo")
"""At the smallest scale; with one task there are no fresh networks."""


@dataclass(frozen=True)
class Games:
    """What is played, and by which learner."""

    name: str
    """In a few words."""
    tasks: str
    """As `--set tasks=` takes them."""
    learner: tuple[str, ...]
    """Settings of the learner, as `--set` takes them."""
    num_steps: Mapping[Scale, int]
    """Steps of the environment in each task."""
    num_seeds: Mapping[Scale, int]
    """Seeds that are reported unless another number is asked for."""
    few: Mapping[Scale, tuple[str, ...]] = field(default_factory=dict)
    """The arms that are run at a scale where not all are."""

    def run(self, asked: Asked, intervention: Intervention = ()) -> TrainingRun:
        """A run of them at a scale."""
        if asked.scale == "smoke" and self not in (TINY_DRIFT, TINY):
            return (TINY_DRIFT if self in DRIFTS else TINY).run(asked, intervention)
        steps = self.num_steps[asked.scale]
        lengths = (f"training.num_steps={steps}", f"learning.exploration.num_steps={steps // 3}")
        run = TrainingRun(self.name, (f"tasks={self.tasks}", *self.learner, *lengths), intervention)
        return replace(run, num_looks=2) if asked.scale == "smoke" else run

    def compared(self, asked: Asked, every: Mapping[str, Intervention]) -> Compared:
        """Of all that can be done what is done at a scale, and what is not."""
        kept = self.few.get(asked.scale, tuple(every))
        return Compared(
            {name: self.run(asked, every[name]) for name in every if name in kept},
            {name: "left out at this scale, for time" for name in every if name not in kept},
        )


@dataclass(frozen=True)
class Compared:
    """What is compared on some games."""

    arms: Mapping[str, TrainingRun]
    """By name, in the order of the table."""
    missing: Mapping[str, str]
    """Those that are not run, and why."""


def _listed(environment: str, games: Mapping[str, Mapping[str, object]]) -> str:
    """Tasks with options, on one line of YAML.

    >>> _listed("smax", {"five": {"scenario": "5gen_zerg"}})
    '[{name: five, environment: smax, options: {scenario: 5gen_zerg}}]'
    """
    tasks = []
    for name, options in games.items():
        written = ", ".join(f"{key}: {value}" for key, value in options.items())
        tasks.append(f"{{name: {name}, environment: {environment}, options: {{{written}}}}}")
    return f"[{', '.join(tasks)}]"


BATTLE_LEARNER = ("preset=pymarl2", "learning.replay.batch_size=32", "training.episodes_per_update=4")
"""PyMARL2's QMIX on a budget, as in docs/smax.md."""
HUNT_LEARNER = ("training.episodes_per_update=2",)
"""PyMARL's QMIX; half its updates, for time."""

COSTS = {f"cost_{cost}": {"punishment": -float(cost)} for cost in (0, 1, 2)}
RACES = {race: {"scenario": f"5gen_{race}"} for race in ("protoss", "terran", "zerg")}
PAPER_STEPS = 2_000_000


def _and_back(games: Mapping[str, Mapping[str, object]], environment: str) -> str:
    first = next(iter(games))
    return f"{_listed(environment, games)[:-1]}, {_listed(environment, {first: games[first]})[1:]}"


TINY_OPTIONS: dict[str, object] = {"height": 3, "width": 3, "num_agents": 2, "num_stags": 1, "episode_limit": 5}
TINY_LEARNER = (
    *("learning.agent.hidden_size=8", "learning.mixer.embed_size=4", "learning.mixer.hypernet_size=8"),
    *("learning.replay.batch_size=4", "learning.replay.capacity=32", "training.num_parallel=4"),
    *("training.num_evaluation_episodes=4", "all_tasks.num_episodes=2", "training.episodes_per_update=2"),
)
TINY_SIZES: dict[Scale, int] = {"smoke": 60}
TINY = Games(
    "a tiny hunt", _listed("predator_prey_tiny", {"tiny": TINY_OPTIONS}), TINY_LEARNER, TINY_SIZES, {"smoke": 2}
)
TINY_DRIFT = Games(
    "tiny hunts",
    _and_back({name: {**TINY_OPTIONS, **cost} for name, cost in COSTS.items()}, "predator_prey_tiny"),
    TINY_LEARNER,
    TINY_SIZES,
    {"smoke": 2},
)

BATTLES = Games(
    "battles of three races",
    _and_back(RACES, "smax"),
    BATTLE_LEARNER,
    {"small": 25_000, "paper": PAPER_STEPS},
    {"smoke": 2, "small": 3, "paper": 5},
    {"smoke": FEWEST, "small": FEWEST},
)
"""Five against five on SMAX, each race once and the first again; at `small` an eighth of what one was learned with."""
HUNTS = Games(
    "hunts that cost more and more",
    _and_back(COSTS, "predator_prey_tiny"),
    HUNT_LEARNER,
    {"small": 10_000, "paper": 250_000},
    {"smoke": 2, "small": 5, "paper": 30},
    {"smoke": FEWEST, "small": ("head reset", *FEWEST, RANDOM, "ReBorn")},
)
"""Predator-prey on a small grid: what a catch by too few costs grows, and is nothing again."""
DRIFTS: tuple[Games, ...] = (BATTLES, HUNTS)

STATIONARY: tuple[Games, ...] = tuple(
    Games(
        name,
        _listed("smax", {name: {"scenario": name}}),
        BATTLE_LEARNER,
        {"small": 60_000, "paper": PAPER_STEPS},
        {"smoke": 2, "small": 3, "paper": 5},
        {"smoke": FEWEST, "small": ("none", "optimizer reset", KNIFE)},
    )
    for name in ("5gen_protoss", "3s_vs_5z")
)
"""The paper's scenarios without drift, on SMAX."""


# -- what is done

AT_SWITCHES = ("surgery.every=null", "surgery.after_task_change=0")
UNITS_AT_SWITCHES = ("surgery.every=null", "surgery.after_task_change=50")
"""On the evidence of a task's first updates, as in the sequences of matrix games."""
FROM_TIME_TO_TIME = ("surgery.every=200",)
"""Where there are no tasks: the paper says a period and not which; two operations in a run at `small`."""
AS_MANY = 0.1
"""The share of units that are taken at random: about as many as are stagnant."""

UNITS: Mapping[str, Intervention] = {
    KNIFE: ("surgery.method=knife", "surgery.criterion=stagnant"),
    "KNIFE, retired": ("surgery.method=knife", "surgery.criterion=stagnant", "surgery.retire=50"),
    RANDOM: ("surgery.method=knife", "surgery.criterion=random", f"surgery.threshold={AS_MANY}"),
    "ReDo": ("surgery.method=redo", "surgery.criterion=dormant", "surgery.threshold=0.1"),
    "ReGraMa": ("surgery.method=redo", "surgery.criterion=grama", "surgery.threshold=0.1"),
    "ReBorn": ("surgery.method=reborn", "surgery.criterion=dormant", "surgery.threshold=0.1"),
    "fade to fresh, agents": (
        *("surgery.method=fade_to_fresh", "surgery.criterion=all", "surgery.parts=[agent]", "surgery.retire=50"),
    ),
}
HEAD_RESET = ("surgery.method=reset", "surgery.layers=[agent.head]")


def arms_of_drift(games: Games, asked: Asked) -> Compared:
    """Controls and methods where tasks follow each other; what is done is done once in each task but the first."""
    at_switches: dict[str, Intervention] = {
        "none": (),
        "optimizer reset": ("switch.reset_optimizer=true",),
        "head reset": (*HEAD_RESET, *AT_SWITCHES),
        FRESH: ("surgery.method=reset", "surgery.layers=[agent, mixer]", *AT_SWITCHES),
    }
    units = {name: (*settings, *_scaled(asked, UNITS_AT_SWITCHES)) for name, settings in UNITS.items()}
    return games.compared(asked, {**at_switches, **units})


def arms_of_stationary(games: Games, asked: Asked) -> Compared:
    """The same from time to time where there is one task; without resets of all that was learned."""
    resets: dict[str, Intervention] = {
        "none": (),
        "optimizer reset": ("surgery.method=reset_optimizer",),
    }
    every = _scaled(asked, FROM_TIME_TO_TIME)
    return games.compared(
        asked, {name: (*settings, *every) if settings else () for name, settings in {**resets, **UNITS}.items()}
    )


def _scaled(asked: Asked, when: Intervention) -> Intervention:
    """Occasions that fit into the tasks of a scale."""
    if asked.scale != "smoke":
        return when
    return tuple(each.replace("=50", "=2").replace("=200", "=3") for each in when)


# -- what is measured


def measures_of_drift() -> tuple[Measure, ...]:
    """How well later tasks were played while they were learned, what became of the units, and returns at their ends."""
    return (
        Measure("return, later tasks", lambda outcome: _mean(_later(outcome), "return"), curve="return"),
        _units(_later),
        Measure("at their ends", lambda outcome: _mean(_later(at_ends(outcome)), "return")),
        Measure("back on the first", lambda outcome: float(at_ends(outcome)["looks"][-1]["return"])),
    )


def measures_of_stationary() -> tuple[Measure, ...]:
    """How well the game was played in the second half, what became of the units, and the share of games won."""
    return (
        Measure("return, second half", lambda outcome: _mean(_second_half(outcome), "return"), curve="return"),
        _units(_second_half),
        Measure("won", lambda outcome: _mean(_second_half(outcome), "win_rate")),
    )


Looks = Sequence[Mapping[str, Any]]


def at_ends(outcome: Mapping[str, Any]) -> dict[str, Any]:
    """The outcome with the last look at each task alone."""
    return {**outcome, "looks": list({look["task"]: look for look in outcome["looks"]}.values())}


def _units(of: Callable[[Mapping[str, Any]], Looks]) -> Measure:
    def stagnant(outcome: Mapping[str, Any]) -> float:
        return (_mean(of(outcome), "agent/stagnant") + _mean(of(outcome), "mixer/stagnant")) / 2

    return Measure("stagnant units", stagnant, True, None, ONE_IN_TWENTY, curve="mixer/stagnant")


def _later(outcome: Mapping[str, Any]) -> Looks:
    return [look for look in outcome["looks"] if look["task"] > 0]


def _second_half(outcome: Mapping[str, Any]) -> Looks:
    looks: Looks = outcome["looks"]
    return looks[len(looks) // 2 :]


def _mean(looks: Looks, name: str) -> float:
    """Of what is there: some games cannot be won."""
    found = [look[name] for look in looks if name in look]
    return float(sum(found) / len(found)) if found else float("nan")
