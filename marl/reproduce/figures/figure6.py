"""Figure 6: KNIFE against its rivals by whole runs, where tasks drift and where they do not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from marl.reproduce.figures.figure import Asked, Figure, Measure, Panel
from marl.reproduce.results import Results
from marl.reproduce.training.arms import (
    DRIFTS,
    STATIONARY,
    Compared,
    Games,
    arms_of_drift,
    arms_of_stationary,
    measures_of_drift,
    measures_of_stationary,
)
from marl.reproduce.verdict import LEVEL

__all__ = ["FIGURE6"]

NOT_TUNED = "Nothing was tuned: learner and methods have the settings of their sources."


def panels(asked: Asked, files: Results) -> Sequence[Panel]:
    """A panel for each sequence of tasks, and for each game alone."""
    drifting = [_panel(games.name, games, asked, arms_of_drift, measures_of_drift()) for games in DRIFTS]
    alone = [
        _panel(f"{games.name} alone", games, asked, arms_of_stationary, measures_of_stationary())
        for games in STATIONARY
    ]
    return [*drifting, *alone]


def _panel(
    name: str,
    games: Games,
    asked: Asked,
    arms_of: Callable[[Games, Asked], Compared],
    measures: Sequence[Measure],
) -> Panel:
    compared = arms_of(games, asked)
    num_seeds = dict.fromkeys(compared.arms, games.num_seeds[asked.scale])
    return Panel(
        name,
        compared.arms,
        measures,
        compared.missing,
        (NOT_TUNED, *_certainty(len(asked.seeds_of(games.num_seeds[asked.scale])))),
        num_seeds=num_seeds,
        unit_of_time="steps",
    )


def _certainty(num_seeds: int) -> list[str]:
    """What so few seeds cannot say, if they are.

    >>> _certainty(5)
    ['With 5 seeds p is at least 0.062: no verdict can be other than open, and intervals are what there is to read.']
    >>> _certainty(30)
    []
    """
    least = 2.0 ** (1 - num_seeds)
    said = (
        f"With {num_seeds} seeds p is at least {least:.3f}: no verdict can be other than open, and intervals are what "
    )
    return [] if least < LEVEL else [f"{said}there is to read."]


FIGURE6 = Figure("figure6", "KNIFE does better than its rivals under task drift, and no worse without.", panels)
