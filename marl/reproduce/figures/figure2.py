"""Figure 2: plasticity over a sequence of battles: how far later tasks stay behind networks that begin afresh."""

from __future__ import annotations

from collections.abc import Sequence

from marl.reproduce.figures.arms import FRESH
from marl.reproduce.figures.figure import Asked, Figure, Measure, Panel
from marl.reproduce.results import Results
from marl.reproduce.training.arms import BATTLES, arms_of_drift, measures_of_drift

__all__ = ["FIGURE2"]

SHOWN = ("none", "optimizer reset", FRESH, "KNIFE, the paper's reading")


def panels(asked: Asked, files: Results) -> Sequence[Panel]:
    """The sequence of battles, beside fresh networks; its runs are figure 6's."""
    arms = arms_of_drift(BATTLES, asked).arms
    absolute, units, *others = measures_of_drift()
    relative = Measure("return less fresh's, later tasks", absolute.of, less=FRESH, curve=absolute.curve)
    panel = Panel(
        BATTLES.name,
        {name: arms[name] for name in SHOWN},
        (relative, units, absolute, *others),
        {},
        ("On SMAX; fresh networks have no more than a task's own time, so that below 0 is plasticity lost.",),
        num_seeds=dict.fromkeys(SHOWN, BATTLES.num_seeds[asked.scale]),
        unit_of_time="steps",
    )
    return [panel]


FIGURE2 = Figure("figure2", "Over a sequence of SMACv2 tasks agents lose the ability to learn.", panels)
