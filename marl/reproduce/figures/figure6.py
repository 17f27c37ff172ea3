"""Figure 6: KNIFE against its rivals by whole runs, where tasks drift and where they do not."""

from __future__ import annotations

from collections.abc import Sequence

from marl.reproduce.figures.figure import Asked, Figure, Panel
from marl.reproduce.results import Results
from marl.reproduce.training.arms import (
    DRIFTS,
    STATIONARY,
    arms_of_drift,
    arms_of_stationary,
    measures_of_drift,
    measures_of_stationary,
)

__all__ = ["FIGURE6"]

NOT_TUNED = "Nothing was tuned: learner and methods have the settings of their sources."


def panels(asked: Asked, files: Results) -> Sequence[Panel]:
    """A panel for each sequence of tasks, and for each game alone."""
    drifting = [
        Panel(
            games.name,
            arms := arms_of_drift(games, asked),
            measures_of_drift(),
            {},
            (NOT_TUNED,),
            num_seeds=dict.fromkeys(arms, games.num_seeds[asked.scale]),
            unit_of_time="steps",
        )
        for games in DRIFTS
    ]
    alone = [
        Panel(
            f"{games.name} alone",
            arms := arms_of_stationary(games, asked),
            measures_of_stationary(),
            {},
            (NOT_TUNED,),
            num_seeds=dict.fromkeys(arms, games.num_seeds[asked.scale]),
            unit_of_time="steps",
        )
        for games in STATIONARY
    ]
    return [*drifting, *alone]


FIGURE6 = Figure("figure6", "KNIFE does better than its rivals under task drift, and no worse without.", panels)
