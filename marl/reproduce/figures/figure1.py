"""Figure 1: agents that learn matrix games in sequence, and then the first again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from marl.reproduce.figures.arms import (
    CONTROLS,
    FADE_TO_FRESH,
    PAPER,
    base_of,
    measures_of,
    same_controls,
    scaled,
    shuffled,
    tasks_of,
)
from marl.reproduce.figures.figure import Asked, Figure, Panel
from marl.reproduce.figures.tuning import METHODS, tuned
from marl.reproduce.matrix.runs import MatrixRun
from marl.reproduce.matrix.tasks import TaskSettings
from marl.reproduce.results import Job, Results

__all__ = ["FIGURE1", "compared"]

WIDE = "as wide as KNIFE's"
OF_PROTOTYPES = "of prototypes: the grid was not run"


def panels(asked: Asked, files: Results) -> list[Panel]:
    """The literal tasks, contextual ones, and these with the optimizer reset at switches."""
    sequences = {
        "a, literal": tasks_of(asked, "literal"),
        "b, contextual": tasks_of(asked, "contextual"),
        "c, contextual, optimizer reset at switches": tasks_of(asked, "contextual", resets=True),
    }
    return [compared(name, asked, tasks, files) for name, tasks in sequences.items()]


def compared(name: str, asked: Asked, tasks: TaskSettings, files: Results, **learner: Any) -> Panel:
    """All controls, the paper's reading and the best setting, on one sequence."""
    base = base_of(asked, tasks, **learner)
    best = {method: tuned(asked, tasks, files, method) for method in METHODS}
    done = {
        **{arm: scaled(asked, each) for arm, each in CONTROLS.items()},
        "KNIFE, the paper's reading": scaled(asked, PAPER),
        "KNIFE, best setting": best["KNIFE"][0],
        "KNIFE, as many at random": shuffled(scaled(asked, PAPER)),
        "fade to fresh, agents": scaled(asked, FADE_TO_FRESH),
        **{f"{method}, best setting": each for method, (each, source) in best.items() if source},
    }
    arms: dict[str, MatrixRun] = {arm: replace(base, intervention=each) for arm, each in done.items()}
    arms["leaky ReLU"] = replace(base, learner=replace(base.learner, activation_fn="leaky_relu"))
    wide = _wide(base, arms["KNIFE, the paper's reading"], asked.seeds, files)
    missing = {f"{each}, best setting": "the grid was not run" for each in METHODS[1:] if not best[each][1]}
    if not wide:
        missing[WIDE] = "KNIFE's own runs are not done"
    else:
        arms[WIDE] = wide
    if tasks.does_reset_optimizer:
        # The sequence does that itself: none and a reset are one.
        arms["optimizer reset"] = arms["none"]
    known = [(method, each, source) for method, (each, source) in best.items() if f"{method}, best setting" in arms]
    found = [f"{method}, best setting: {each} ({source or OF_PROTOTYPES})." for method, each, source in known]
    return Panel(name, arms, measures_of(tasks.kind), missing, [*same_controls(tasks), *found])


def _wide(base: MatrixRun, knife: MatrixRun, seeds: Sequence[int], files: Results) -> MatrixRun | None:
    """Networks that are from the start as wide as KNIFE's have become in the mean; none while these are not done."""
    runs = files.of(Job(knife, tuple(seeds)))
    if len(runs) < len(seeds):
        return None
    rows = [run.outcome["rows"] for run in runs]

    def grown(size: int, part: str) -> int:
        sites = sorted({site for each in rows for site in each if site.startswith(part) and site != "mixer.v.0"})
        added = [np.mean([each.get(site, 0) for each in rows]) for site in sites]
        return size + math.ceil(float(np.mean(added))) if added else size

    learner = base.learner
    agent_size, hypernet_size = grown(learner.agent_size, "agent."), grown(learner.hypernet_size, "mixer.")
    return replace(base, learner=replace(learner, agent_size=agent_size, hypernet_size=hypernet_size))


FIGURE1 = Figure(
    "figure1",
    "Agents that learn matrix games in sequence lose the ability to learn, and KNIFE gives it back, on the first game "
    "too when it comes again.",
    panels,
)
