"""Figure 8: the same with other ways to factor the joint value."""

from __future__ import annotations

from marl.reproduce.figures.arms import tasks_of
from marl.reproduce.figures.figure import Asked, Figure, Panel
from marl.reproduce.figures.figure1 import compared
from marl.reproduce.figures.tuning import METHODS
from marl.reproduce.results import Results
from marl.settings import Algorithm

__all__ = ["FIGURE8"]

ALGORITHMS: tuple[Algorithm, ...] = ("qmix", "qplex", "vdn")

ARMS = (
    *("none", "optimizer reset", "head x 0.1", "fresh networks"),
    *("KNIFE, the paper's reading", "KNIFE, best setting", "KNIFE, as many at random"),
)


def panels(asked: Asked, files: Results) -> list[Panel]:
    """Each mixer on the literal tasks and on contextual ones, at `small` VDN on the literal ones alone; at the largest
    scale with memory and with epsilon too.
    """
    variants: dict[str, dict[str, str]] = {"": {}}
    if asked.scale == "paper":
        variants |= {", GRU": {"agent": "recurrent"}, ", epsilon-greedy": {"exploration": "epsilon"}}
    return [
        _fewer(compared(f"{algorithm}, {tasks.name}{name}", asked, tasks, files, algorithm=algorithm, **learner))
        for algorithm in ALGORITHMS
        for tasks in (tasks_of(asked, "literal"), tasks_of(asked, "contextual"))
        if algorithm != "vdn" or asked.scale != "small" or tasks.kind == "literal"  # for time
        for name, learner in variants.items()
    ]


def _fewer(panel: Panel) -> Panel:
    arms = {name: panel.arms[name] for name in ARMS}
    notes = [note for note in panel.notes if not note.startswith(METHODS[1:])]  # of arms that are left out
    return Panel(panel.name, arms, panel.measures, {}, [*notes, "Other controls are in figure 1."])


FIGURE8 = Figure("figure8", "KNIFE works for QPLEX and for QMIX.", panels)
