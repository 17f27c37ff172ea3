"""Figure 7: single units against whole layers, criteria against methods, and what each member is good for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from marl.reproduce.figures.arms import (
    CONTROLS,
    FADE_TO_FRESH,
    KNIFE,
    PAPER,
    base_of,
    measures_of,
    same_controls,
    scaled,
    shuffled,
    tasks_of,
)
from marl.reproduce.figures.figure import Asked, Figure, Panel
from marl.reproduce.matrix.interventions import Intervention, Layers, Units
from marl.reproduce.matrix.tasks import TaskSettings
from marl.reproduce.results import Results

__all__ = ["FIGURE7"]

WHEN = PAPER.when

UNITS: dict[str, Intervention] = {
    f"{method}, {criterion} units": Intervention(
        Units(replace(KNIFE, method=method.lower(), criterion=criterion)), WHEN
    )
    for method in ("KNIFE", "ReDo")  # ReDo of units of low gradient is ReGraMa
    for criterion in ("stagnant", "dormant", "grama")
} | {"ReBorn, dormant units": Intervention(Units(replace(KNIFE, method="reborn", criterion="dormant")), WHEN)}

LAYERS: dict[str, Intervention] = {
    "agents reset": Intervention(Layers("reset", ("agent",))),
    "mixer reset": Intervention(Layers("reset", ("mixer",))),
    "shrink and perturb": Intervention(Layers("shrink_and_perturb")),
    "fade to fresh, agents": FADE_TO_FRESH,
}

ABLATIONS: dict[str, Intervention] = {
    "KNIFE": PAPER,
    "without knowledge": Intervention(Units(KNIFE, lack="knowledge"), WHEN),
    "without compensation": Intervention(Units(KNIFE, lack="compensation"), WHEN),
    "without re-initialization": Intervention(Units(KNIFE, lack="renewal"), WHEN),
    "as many units at random": shuffled(PAPER),
    "optimizer keeps the old rows' state": Intervention(Units(KNIFE, state="kept"), WHEN),
    "outgoing weights renewed": Intervention(Units(KNIFE, lack="outgoing"), WHEN),
}

NOT_RUN: dict[str, dict[str, str]] = {
    "levels": {"plasticity injection": "its frozen copies have no form side by side"},
    "ablations": {},
}


def panels(asked: Asked, files: Results) -> list[Panel]:
    """Both questions, on the literal tasks and on contextual ones with the optimizer reset at switches."""
    sequences = (tasks_of(asked, "literal"), tasks_of(asked, "contextual", resets=True))
    return [
        _panel(f"{question}, {tasks.name}", asked, tasks, arms, NOT_RUN[question])
        for question, arms in (("levels", {**UNITS, **LAYERS}), ("ablations", ABLATIONS))
        for tasks in sequences
    ]


def _panel(
    name: str, asked: Asked, tasks: TaskSettings, arms: Mapping[str, Intervention], missing: Mapping[str, str]
) -> Panel:
    base = base_of(asked, tasks)
    done = {arm: replace(base, intervention=scaled(asked, each)) for arm, each in {**CONTROLS, **arms}.items()}
    if tasks.does_reset_optimizer:
        done["optimizer reset"] = done["none"]
    return Panel(name, done, measures_of(tasks.kind), missing, same_controls(tasks))


FIGURE7 = Figure(
    "figure7",
    "Methods that act on single units do better than those that reset layers, they do better by stagnant units than by "
    "other criteria, and each member of the composite is needed.",
    panels,
)
