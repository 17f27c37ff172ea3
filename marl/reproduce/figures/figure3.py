"""Figure 3: where stagnant units sit: in agents, in hypernetworks, or among the units whose weights these generate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from marl.reproduce.figures.figure import Asked, Figure, Measure, Panel
from marl.reproduce.results import Results
from marl.reproduce.training.arms import DRIFTS, STATIONARY, arms_of_drift, arms_of_stationary

__all__ = ["FIGURE3"]

PLACES = {"agents": "agent/stagnant", "hypernetworks": "mixer/stagnant", "mixing units": "mixer/generated_stagnant"}


def panels(asked: Asked, files: Results) -> Sequence[Panel]:
    """Shares at the end of training, and what they have grown by since before the first update."""
    runs = {games.name: arms_of_drift(games, asked).arms["none"] for games in DRIFTS}
    runs |= {games.name: arms_of_stationary(games, asked).arms["none"] for games in STATIONARY}
    num_seeds = {games.name: games.num_seeds[asked.scale] for games in (*DRIFTS, *STATIONARY)}
    grown = [Measure(place, _of(f"{name}_grown"), curve=name) for place, name in PLACES.items()]
    at_end = [Measure(place, _of(name), curve=name) for place, name in PLACES.items()]
    more = Measure("hypernetworks less agents", _more_in_hypernetworks)
    notes = ("Mixing units have generated weights: they are measured, and never operated on.",)
    return [
        Panel(
            "grown since before the first update",
            runs,
            (*grown, more),
            {},
            notes,
            kind="shares",
            num_seeds=num_seeds,
            unit_of_time="steps",
        ),
        Panel("at the end", runs, at_end, {}, kind="shares", num_seeds=num_seeds, unit_of_time="steps"),
    ]


def _of(name: str) -> Any:
    return lambda outcome: float(outcome["looks"][-1][name])


def _more_in_hypernetworks(outcome: Mapping[str, Any]) -> float:
    last = outcome["looks"][-1]
    return float(last["mixer/stagnant_grown"] - last["agent/stagnant_grown"])


FIGURE3 = Figure("figure3", "Stagnant units are more concentrated in the mixer's hypernetworks.", panels)
