"""Figures of drawn scores, and runs of matrix games that are only pretended, for tests of what comes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from marl.reproduce.figures.figure import Figure, Measure, Panel
from marl.reproduce.matrix.interventions import Intervention, Layers
from marl.reproduce.matrix.runs import MatrixRun
from marl.reproduce.results import Work
from marl.run_settings import SurgerySettings


@dataclass(frozen=True)
class Drawn:
    """Scores that are drawn, better or worse by a shift."""

    shift: float
    fails: bool = False
    side_by_side: ClassVar[int] = 16

    @property
    def label(self) -> str:
        return f"drawn {self.shift}"

    def run(self, seeds: Sequence[int]) -> Sequence[Mapping[str, Any]]:
        if self.fails:
            raise RuntimeError("on purpose")
        return [made_up(np.random.default_rng(seed).normal() + self.shift) for seed in seeds]


def made_up(score: float, **others: float) -> dict[str, Any]:
    looks = [{"task": task, "update": 10, "solved": score, "error": score, "agent/stagnant": 0.5} for task in range(4)]
    return {"looks": [{**look, **others} for look in looks], "rows": {}, "seconds": 1.0, "units": 0}


SCORE = Measure("score", lambda outcome: float(outcome["looks"][-1]["solved"]))
UNITS = Measure("units", lambda outcome: float(outcome["looks"][-1]["agent/stagnant"]), is_less_better=True)


def figure_of(**arms: Work) -> Figure:
    return Figure("drawn", "Some are better.", lambda asked, files: [Panel("one", arms, [SCORE, UNITS], {})])


# -- pretended runs of matrix games

PLAIN = SurgerySettings()


def score_of(intervention: Intervention) -> float:
    """Made up: one time is best, and of these one duration of the fade, or factor."""
    act = intervention.act
    is_best = act.factor == 0.03 if isinstance(act, Layers) else getattr(act, "settings", PLAIN).retire == 300
    return float(intervention.when.after == 100) + 0.1 * is_best


def pretended(self: MatrixRun, seeds: Sequence[int]) -> Sequence[Mapping[str, Any]]:
    return [made_up(1 + score_of(self.intervention)) for _ in seeds]
