"""What is best, from an open grid: no figure of the paper, but what its figures here are run with.

All settings are tried on a few seeds, the best quarter on all seeds that are for tuning; none of these is reported.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Literal

import numpy as np

from marl.reproduce.figures.arms import BEST_SO_FAR, CONTROLS, FRESH, KNIFE, base_of, measures_of, scaled, tasks_of
from marl.reproduce.figures.figure import SIDE_BY_SIDE, Asked, Scale
from marl.reproduce.matrix.interventions import Intervention, Occasion, Units
from marl.reproduce.matrix.runs import MatrixRun
from marl.reproduce.matrix.tasks import TaskSettings
from marl.reproduce.results import Job, Results, jobs_of
from marl.run_settings import Part

__all__ = ["grid", "ranked", "tuned", "tuning_jobs"]

FIRST_SEEDS: dict[Scale, int] = {"smoke": 1, "small": 8, "paper": 8}
ALL_SEEDS: dict[Scale, int] = {"smoke": 2, "small": 32, "paper": 32}
KEPT = 4
"""One in so many settings goes into the second round."""

State = Literal["fresh", "peers", "kept"]
PARTS: tuple[tuple[Part, ...], ...] = (("agent",), ("mixer",), ("agent", "mixer"))
SELECTIONS = (("stagnant", False), ("stagnant", True), ("all", False))
"""A criterion, and whether as many others are taken."""
OCCASIONS = (Occasion(1), Occasion(50, stride=5), Occasion(100, stride=5), Occasion(100, every=100, stride=5))
RETIRE = (None, 100, 300)
STATES: dict[Scale, tuple[State, ...]] = {
    "smoke": ("fresh",),
    "small": ("fresh",),
    "paper": ("fresh", "peers", "kept"),
}


def grid(asked: Asked) -> list[Intervention]:
    """All settings that are tried; at the smallest scale two of them.

    >>> len(grid(Asked.of("small"))), len(grid(Asked.of("paper")))
    (108, 324)
    """
    found = list(_settings(asked))
    return [scaled(asked, each) for each in (found[:1] + found[-1:] if asked.scale == "smoke" else found)]


def tuning_jobs(asked: Asked, files: Results) -> list[Job]:
    """What can be run now, of all sequences."""
    return [job for tasks in sequences(asked) for job in _jobs(asked, tasks, files)]


def tuned(asked: Asked, tasks: TaskSettings, files: Results) -> tuple[Intervention, str]:
    """The best setting for a sequence, and where it is from: the grid if that was run, prototypes if not."""
    found = ranked(asked, tasks, files)
    if not found:
        return scaled(asked, BEST_SO_FAR[tasks.kind]), "of the prototypes: the grid was not run"
    return found[0][0], f"best of {len(grid(asked))}, tuned on seeds 0 to {ALL_SEEDS[asked.scale] - 1}"


def ranked(asked: Asked, tasks: TaskSettings, files: Results) -> list[tuple[Intervention, float]]:
    """The settings of the second round with their mean scores, best first; empty while any run is missing."""
    seeds = range(ALL_SEEDS[asked.scale])
    finalists = _finalists(asked, tasks, files)
    return _ordered(asked, tasks, files, finalists, seeds) if finalists else []


def sequences(asked: Asked) -> list[TaskSettings]:
    """What is tuned for: the literal tasks, and contextual ones with and without a reset of the optimizer."""
    return [
        tasks_of(asked, "literal"),
        tasks_of(asked, "contextual"),
        tasks_of(asked, "contextual", resets=True),
    ]


def _settings(asked: Asked) -> Iterator[Intervention]:
    options = product(PARTS, SELECTIONS, OCCASIONS, RETIRE, STATES[asked.scale])
    for parts, (criterion, is_shuffled), when, retire, state in options:
        settings = replace(KNIFE, parts=parts, criterion=criterion, retire=retire)
        yield Intervention(Units(settings, is_shuffled, state), when)


def _jobs(asked: Asked, tasks: TaskSettings, files: Results) -> list[Job]:
    base, finalists = base_of(asked, tasks), _finalists(asked, tasks, files)
    first, every = range(FIRST_SEEDS[asked.scale]), range(ALL_SEEDS[asked.scale])
    # the fresh networks that errors are relative to
    works = [_with(base, each) for each in (*grid(asked), CONTROLS[FRESH])]
    last = [_with(base, each) for each in (*finalists, *([CONTROLS[FRESH]] if finalists else []))]
    jobs = jobs_of(works, first, side_by_side=SIDE_BY_SIDE)
    return jobs + jobs_of(last, every[len(first) :], side_by_side=SIDE_BY_SIDE)


def _finalists(asked: Asked, tasks: TaskSettings, files: Results) -> list[Intervention]:
    found = _ordered(asked, tasks, files, grid(asked), range(FIRST_SEEDS[asked.scale]))
    return [each for each, _ in found[: -(-len(found) // KEPT)]]


def _ordered(
    asked: Asked, tasks: TaskSettings, files: Results, settings: Sequence[Intervention], seeds: Sequence[int]
) -> list[tuple[Intervention, float]]:
    base, measure = base_of(asked, tasks), measures_of(tasks.kind)[0]
    jobs = [Job(_with(base, each), tuple(seeds)) for each in (*settings, CONTROLS[FRESH])]
    if any(files.missing(job) for job in jobs):
        return []
    runs = [files.of(job) for job in jobs]
    means = [float(np.mean([measure.of(run.outcome) for run in each])) for each in runs]
    scale = means[-1] if measure.relative_to == FRESH else 1.0
    scored = [(each, score / scale) for each, score in zip(settings, means, strict=False)]
    return sorted(scored, key=lambda pair: pair[1], reverse=not measure.is_less_better)


def _with(base: MatrixRun, intervention: Intervention) -> MatrixRun:
    return replace(base, intervention=intervention)
