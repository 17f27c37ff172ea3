"""What is best, from an open grid: no figure of the paper, but what its figures here are run with.

Each method gets as many settings and seeds as any other. All settings are tried on a few seeds, the best quarter on all
seeds that are for tuning; none of these is reported.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Literal, get_args

import numpy as np

from marl.reproduce.figures.arms import (
    BEST_SO_FAR,
    CONTROLS,
    FADE_TO_FRESH,
    FRESH,
    KNIFE,
    base_of,
    measures_of,
    scaled,
    tasks_of,
)
from marl.reproduce.figures.figure import Asked, Scale
from marl.reproduce.matrix.interventions import Intervention, Layers, Occasion, Units
from marl.reproduce.matrix.runs import MatrixRun
from marl.reproduce.matrix.tasks import Kind, TaskSettings
from marl.reproduce.results import Job, Results, jobs_of
from marl.run_settings import Part, SurgerySettings

__all__ = ["METHODS", "Method", "grid", "ranked", "sequences", "tried", "tuned", "tuning_jobs"]

Method = Literal["KNIFE", "fade to fresh", "head scaled"]
METHODS: tuple[Method, ...] = get_args(Method)
"""What has settings to choose from; other arms have none."""

FIRST_SEEDS: dict[Scale, int] = {"smoke": 1, "small": 4, "paper": 8}
ALL_SEEDS: dict[Scale, int] = {"smoke": 2, "small": 16, "paper": 32}
KEPT = 4
"""One in so many settings goes into the second round."""
NUM_TASKS: dict[tuple[Scale, Kind], int] = {("small", "contextual"): 20}
"""Tasks in tuning where they are fewer than in what is reported."""

State = Literal["fresh", "peers", "kept"]
STATES: tuple[State, ...] = get_args(State)
AGENT: tuple[Part, ...] = ("agent",)
BOTH: tuple[Part, ...] = ("agent", "mixer")
OCCASIONS = (Occasion(1), Occasion(50, stride=5), Occasion(100, stride=5), Occasion(100, every=100, stride=5))
FADE = replace(KNIFE, method="fade_to_fresh", retire=100)

Chosen = tuple[Literal["stagnant", "all"], bool, Occasion]
"""A criterion, whether as many others are taken, and when."""
EARLY: tuple[Chosen, ...] = (("stagnant", False, OCCASIONS[2]), ("all", False, OCCASIONS[0]))
LATE: tuple[Chosen, ...] = (("all", False, OCCASIONS[0]), ("all", False, OCCASIONS[2]))
OPEN: tuple[Chosen, ...] = (
    *(("stagnant", False, when) for when in OCCASIONS),
    *(("stagnant", True, when) for when in OCCASIONS),
    *(("all", False, when) for when in OCCASIONS),
)


def grid(asked: Asked, method: Method) -> list[Intervention]:
    """All settings of a method that are tried; at the smallest scale two of them.

    >>> [[len(grid(Asked.of(scale), method)) for method in METHODS] for scale in ("small", "paper")]
    [[8, 8, 8], [324, 324, 324]]
    """
    found = list((OPEN_GRIDS if asked.scale == "paper" else SMALL_GRIDS)[method]())
    return [scaled(asked, each) for each in (found[:1] + found[-1:] if asked.scale == "smoke" else found)]


def tuning_jobs(asked: Asked, files: Results) -> list[Job]:
    """What can be run now, of all sequences."""
    return [job for tasks in sequences(asked) for job in _jobs(asked, tasks, files)]


def tuned(asked: Asked, tasks: TaskSettings, files: Results, method: Method) -> tuple[Intervention, str | None]:
    """A method's best setting for a sequence, and where it is from; without a grid that of prototypes, and None."""
    found = ranked(asked, tasks, files, method)
    if not found:
        knife, head = BEST_SO_FAR[tasks.kind], CONTROLS["head x 0.1"]
        known: dict[Method, Intervention] = {"KNIFE": knife, "fade to fresh": FADE_TO_FRESH, "head scaled": head}
        return scaled(asked, known[method]), None
    length = "" if _tuned_on(asked, tasks) == tasks else f", the first {_tuned_on(asked, tasks).num_tasks} tasks"
    return found[0][0], f"best of {len(grid(asked, method))}, tuned on seeds 0 to {ALL_SEEDS[asked.scale] - 1}{length}"


def ranked(asked: Asked, tasks: TaskSettings, files: Results, method: Method) -> list[tuple[Intervention, float]]:
    """The settings of the second round with their mean scores, best first; empty while any run is missing."""
    tasks, seeds = _tuned_on(asked, tasks), range(ALL_SEEDS[asked.scale])
    finalists = _finalists(asked, tasks, files, method)
    return _ordered(asked, tasks, files, (finalists, seeds)) if finalists else []


def tried(asked: Asked, tasks: TaskSettings, files: Results, method: Method) -> dict[Intervention, str]:
    """How each setting did, on the few seeds of the first round or, in bold, on all of the second."""
    tasks, few, every = _tuned_on(asked, tasks), range(FIRST_SEEDS[asked.scale]), range(ALL_SEEDS[asked.scale])
    first = _ordered(asked, tasks, files, (grid(asked, method), few))
    last = _ordered(asked, tasks, files, (_finalists(asked, tasks, files, method), every))
    return {each: f"{score:.2f}" for each, score in first} | {each: f"**{score:.2f}**" for each, score in last}


def sequences(asked: Asked) -> list[TaskSettings]:
    """What is tuned for: the literal tasks, and contextual ones with and without a reset of the optimizer."""
    return [
        tasks_of(asked, "literal"),
        tasks_of(asked, "contextual"),
        tasks_of(asked, "contextual", resets=True),
    ]


def _tuned_on(asked: Asked, tasks: TaskSettings) -> TaskSettings:
    return replace(tasks, num_tasks=NUM_TASKS.get((asked.scale, tasks.kind), tasks.num_tasks))


def _jobs(asked: Asked, tasks: TaskSettings, files: Results) -> list[Job]:
    tasks = _tuned_on(asked, tasks)
    base, finalists = base_of(asked, tasks), [each for of in METHODS for each in _finalists(asked, tasks, files, of)]
    first, every = range(FIRST_SEEDS[asked.scale]), range(ALL_SEEDS[asked.scale])
    # the fresh networks that errors are relative to
    works = [_with(base, each) for of in METHODS for each in grid(asked, of)] + [_with(base, CONTROLS[FRESH])]
    last = [_with(base, each) for each in (*finalists, *([CONTROLS[FRESH]] if finalists else []))]
    jobs = jobs_of(works, first, side_by_side=base.side_by_side)
    return jobs + jobs_of(last, every[len(first) :], side_by_side=base.side_by_side)


def _finalists(asked: Asked, tasks: TaskSettings, files: Results, method: Method) -> list[Intervention]:
    found = _ordered(asked, tasks, files, (grid(asked, method), range(FIRST_SEEDS[asked.scale])))
    return [each for each, _ in found[: -(-len(found) // KEPT)]]


def _ordered(
    asked: Asked, tasks: TaskSettings, files: Results, tried: tuple[Sequence[Intervention], Sequence[int]]
) -> list[tuple[Intervention, float]]:
    """Settings by their mean over seeds, best first; empty while any run is missing."""
    (settings, seeds), base, measure = tried, base_of(asked, tasks), measures_of(tasks.kind)[0]
    jobs = [Job(_with(base, each), tuple(seeds)) for each in (*settings, CONTROLS[FRESH])]
    if any(files.missing(job) for job in jobs):
        return []
    means = [float(np.mean([measure.of(run.outcome) for run in files.of(job)])) for job in jobs]
    scale = means[-1] if measure.relative_to == FRESH else 1.0
    scored = [(each, score / scale) for each, score in zip(settings, means, strict=False)]
    return sorted(scored, key=lambda pair: pair[1], reverse=not measure.is_less_better)


def _with(base: MatrixRun, intervention: Intervention) -> MatrixRun:
    return replace(base, intervention=intervention)


# -- the grids


def _units(
    settings: SurgerySettings,
    parts: Sequence[tuple[Part, ...]],
    chosen: Sequence[Chosen],
    retire: Sequence[int | None],
    states: Sequence[State] = ("fresh",),
) -> Iterator[Intervention]:
    for own, (criterion, is_shuffled, when), steps, state in product(parts, chosen, retire, states):
        each = replace(settings, parts=own, criterion=criterion, retire=steps)
        yield Intervention(Units(each, is_shuffled, state), when)


def _heads(factors: Sequence[float], occasions: Sequence[Occasion]) -> Iterator[Intervention]:
    for factor, when in product(factors, occasions):
        yield Intervention(Layers("scale_head", ("agent.head",), factor), when)


PARTS: tuple[tuple[Part, ...], ...] = (AGENT, ("mixer",), BOTH)
FACTORS = tuple(round(float(each), 5) for each in np.geomspace(0.001, 0.9, 81))
LAYER_OCCASIONS = (Occasion(), Occasion(1), Occasion(50), Occasion(100))

OPEN_GRIDS = {
    "KNIFE": partial(_units, KNIFE, PARTS, OPEN, (None, 100, 300), STATES),
    "fade to fresh": partial(_units, FADE, PARTS, OPEN, (30, 100, 300), STATES),
    "head scaled": partial(_heads, FACTORS, LAYER_OCCASIONS),
}
SMALL_GRIDS = {
    "KNIFE": partial(_units, KNIFE, (AGENT, BOTH), EARLY, (None, 100)),
    "fade to fresh": partial(_units, FADE, (AGENT, BOTH), LATE, (100, 300)),
    "head scaled": partial(_heads, (0.01, 0.03, 0.1, 0.3), (Occasion(), Occasion(100))),
}
"""What 40 minutes of processor time allow. Left out of the open grid: the mixer alone, as many units at random, once 50
updates have passed and again and again, KNIFE's rows retired over 300 updates, and other states of new rows."""
