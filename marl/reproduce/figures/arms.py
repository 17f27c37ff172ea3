"""The arms of comparisons on matrix games, and what is measured of them.

What the paper leaves open is said here: when, on what evidence and where it operates. `PAPER` is the plainest reading;
what is best is tuned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from marl.reproduce.figures.figure import Asked, Measure, Scale
from marl.reproduce.matrix.interventions import NOTHING, Intervention, Layers, Occasion, Units
from marl.reproduce.matrix.learners import LearnerSettings
from marl.reproduce.matrix.runs import MatrixRun
from marl.reproduce.matrix.tasks import Kind, TaskSettings
from marl.run_settings import SurgerySettings

__all__ = [
    "BEST_SO_FAR",
    "CONTROLS",
    "FADE_TO_FRESH",
    "FRESH",
    "KNIFE",
    "PAPER",
    "base_of",
    "measures_of",
    "same_controls",
    "shuffled",
    "tasks_of",
]

KNIFE = SurgerySettings(method="knife", criterion="stagnant")

PAPER = Intervention(Units(KNIFE), Occasion(after=100, stride=5))
"""The paper's reading: stagnant units of all hidden layers, judged by the first 100 updates of a task, for good."""

BEST_SO_FAR: dict[Kind, Intervention] = {
    "literal": Intervention(Units(replace(KNIFE, criterion="all", parts=("agent",), retire=100)), Occasion(after=1)),
    "contextual": Intervention(Units(replace(KNIFE, retire=100)), Occasion(after=100, stride=5)),
}
"""What prototypes found best, for as long as nothing was tuned here."""

FRESH = "fresh networks"
"""The arm that forgets everything at each switch: what is learned from nothing in the time of a task."""

CONTROLS: dict[str, Intervention] = {
    "none": NOTHING,
    "optimizer reset": Intervention(Layers("reset_optimizer")),
    "head x 0.1": Intervention(Layers("scale_head", ("agent.head",), 0.1)),
    "head reset": Intervention(Layers("reset", ("agent.head",))),
    "hidden layers reset": Intervention(Layers("reset", "hidden")),
    FRESH: Intervention(Layers("reset")),
}
"""What is compared with everywhere."""

FADE_TO_FRESH = Intervention(
    Units(replace(KNIFE, method="fade_to_fresh", criterion="all", parts=("agent",), retire=100)), Occasion(after=1)
)
"""Fresh units that fade in where all of the agents' were, without what these knew."""

SIZES: dict[tuple[Scale, Kind], tuple[int, int]] = {
    ("smoke", "literal"): (3, 12),
    ("smoke", "contextual"): (3, 12),
    ("small", "literal"): (6, 1500),
    ("small", "contextual"): (60, 120),
    ("paper", "literal"): (6, 1500),
    ("paper", "contextual"): (60, 120),
}
"""Tasks, and updates of each."""

RATES: dict[Kind, float] = {"literal": 5e-4, "contextual": 3e-3}
NUM_LOOKS: dict[Kind, int] = {"literal": 5, "contextual": 1}

ONE_IN_TWENTY = 0.05
"""The smallest difference between shares of units that counts: by what luck alone makes two fresh networks differ, of
which the share after one task has a standard deviation of 0.03 over seeds in literal tasks and 0.02 in contextual ones
(decision 0035)."""


def tasks_of(asked: Asked, kind: Kind, *, resets: bool = False) -> TaskSettings:
    """A sequence at a scale."""
    num_tasks, num_updates = SIZES[asked.scale, kind]
    if asked.scale == "smoke":
        return TaskSettings(kind, num_tasks, num_updates, resets, batch_size=8, num_contexts=4, num_features=4)
    return TaskSettings(kind, num_tasks, num_updates, resets)


def base_of(asked: Asked, tasks: TaskSettings, **learner: Any) -> MatrixRun:
    """A run without intervention."""
    if asked.scale == "smoke":
        learner = {"agent_size": 8, "hypernet_size": 8, "embed_size": 4, **learner}
    settings = LearnerSettings(learning_rate=RATES[tasks.kind], **learner)
    return MatrixRun(tasks, settings, num_looks=NUM_LOOKS[tasks.kind])


def scaled(asked: Asked, intervention: Intervention) -> Intervention:
    """An intervention whose occasions fit into the tasks of a scale.

    >>> scaled(Asked.of("smoke"), PAPER).when
    Occasion(after=6, every=None, stride=1)
    """
    if asked.scale != "smoke":
        return intervention
    when, act = intervention.when, intervention.act
    if isinstance(act, Units):
        retire = None if act.settings.retire is None else 4
        act = replace(act, settings=replace(act.settings, retire=retire, cooldown=0))
    every = None if when.every is None else 4
    return Intervention(act, Occasion(min(when.after, 6), every))


def shuffled(intervention: Intervention) -> Intervention:
    """The same with as many units taken at random."""
    assert isinstance(intervention.act, Units)
    return replace(intervention, act=replace(intervention.act, is_shuffled=True))


def same_controls(tasks: TaskSettings) -> list[str]:
    """What a reader has to know of a sequence that resets the optimizer itself: there is one control, not two."""
    if not tasks.does_reset_optimizer:
        return []
    return ["This sequence resets the optimizer at each switch, so that none and a fresh optimizer are one control."]


# -- measures


def measures_of(kind: Kind) -> tuple[Measure, ...]:
    """What the claim is about, what became of the units, and what else is reported."""
    units = (
        Measure("stagnant units", lambda outcome: _of_units(outcome, "stagnant"), True, None, ONE_IN_TWENTY),
        Measure("dead units", lambda outcome: _of_units(outcome, "dead"), True, None, ONE_IN_TWENTY),
    )
    if kind == "literal":
        return Measure("tasks solved", _solved, curve="solved", each_task=_each_solved), *units
    error = Measure("error / fresh", _late_error, is_less_better=True, relative_to=FRESH, curve="error")
    return error, *units, Measure("contexts solved", _solved)


def _at_ends(outcome: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What was measured at the end of each task."""
    latest = {look["task"]: look for look in outcome["looks"]}
    return list(latest.values())


def _solved(outcome: Mapping[str, Any]) -> float:
    """The share of tasks after the first that are solved at their end, or of contexts in them."""
    ends = _at_ends(outcome)[1:]
    return float(sum(look["solved"] for look in ends) / len(ends))


def _each_solved(outcome: Mapping[str, Any]) -> dict[str, bool]:
    """Whether each task is solved at its end; the last is the first again."""
    solved = [look["solved"] == 1 for look in _at_ends(outcome)]
    names = [*(f"task {1 + place}" for place in range(len(solved) - 1)), "task 1 again"]
    return dict(zip(names, solved, strict=True))


def _late(outcome: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    ends = _at_ends(outcome)
    return ends[len(ends) // 2 :]


def _late_error(outcome: Mapping[str, Any]) -> float:
    """The mean error at the ends of the second half of the tasks."""
    late = _late(outcome)
    return float(sum(look["error"] for look in late) / len(late))


def _of_units(outcome: Mapping[str, Any], condition: str) -> float:
    """The mean share of units in a condition at the ends of the second half of the tasks, agents and mixer alike."""
    shares = [value for look in _late(outcome) for name, value in look.items() if name.endswith(f"/{condition}")]
    return float(sum(shares) / len(shares))
