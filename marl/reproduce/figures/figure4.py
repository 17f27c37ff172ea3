"""Figure 4: how many units are stagnant, dormant, or inactive by GraMa, over training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from marl.reproduce.figures.figure import Asked, Figure, Measure, Panel
from marl.reproduce.results import Results
from marl.reproduce.training.arms import DRIFTS, STATIONARY, Games, arms_of_drift, arms_of_stationary

__all__ = ["FIGURE4"]

CONDITIONS = ("stagnant", "dormant", "grama")
PARTS = {"agent": "agents", "mixer": "hypernetworks"}


def panels(asked: Asked, files: Results) -> Sequence[Panel]:
    """A panel for each part of the networks, with all games."""
    games: tuple[Games, ...] = (*STATIONARY, *DRIFTS)
    runs = {
        each.name: (arms_of_drift if each in DRIFTS else arms_of_stationary)(each, asked).arms["none"] for each in games
    }
    num_seeds = {each.name: each.num_seeds[asked.scale] for each in games}
    return [
        Panel(
            f"{title}, mean over training",
            runs,
            [Measure(name, _mean_of(f"{part}/{name}"), curve=f"{part}/{name}") for name in CONDITIONS],
            {},
            kind="shares",
            num_seeds=num_seeds,
            unit_of_time="steps",
        )
        for part, title in PARTS.items()
    ]


def _mean_of(name: str) -> Any:
    def mean(outcome: Mapping[str, Any]) -> float:
        values = [look[name] for look in outcome["looks"]]
        return float(sum(values) / len(values))

    return mean


FIGURE4 = Figure("figure4", "More units are stagnant than dormant or inactive by GraMa.", panels)
