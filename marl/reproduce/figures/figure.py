"""What a figure is: a claim, panels of arms that are compared on the same seeds, and measures of how they did."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from marl.errors import SettingsError
from marl.reproduce.results import Job, Result, Results, Work, jobs_of
from marl.reproduce.statistics import Scores

__all__ = ["Asked", "Figure", "Measure", "Panel", "Runs", "Scale", "scores_of"]

Scale = Literal["smoke", "small", "paper"]
"""`smoke` shows that all runs, `small` is for two cores and an evening, `paper` for a cluster."""

NUM_SEEDS: dict[Scale, int] = {"smoke": 2, "small": 30, "paper": 100}
FIRST_SEED = 1000
"""Of what is reported; what is tuned has the seeds from 0 on."""

SIDE_BY_SIDE = 16
"""Seeds of matrix games that train together, at most; a kill costs that many runs."""


@dataclass(frozen=True)
class Asked:
    """What somebody asked for."""

    scale: Scale
    """How much is run."""
    num_seeds: int
    """Seeds of what is reported."""

    @staticmethod
    def of(scale: str, num_seeds: int | None = None) -> Asked:
        """A scale by name, with its own number of seeds unless another is given.

        Raises:
            SettingsError: there is no such scale, or the seeds are fewer than two.

        >>> Asked.of("small")
        Asked(scale='small', num_seeds=30)
        """
        if scale not in get_args(Scale):
            raise SettingsError(f"there is no scale {scale!r}; choose one of {', '.join(map(repr, get_args(Scale)))}")
        known: Scale = scale  # type: ignore[assignment]
        number = NUM_SEEDS[known] if num_seeds is None else num_seeds
        if number < 2:
            raise SettingsError(f"asked for {number} seeds: an interval needs at least 2")
        return Asked(known, number)

    @property
    def seeds(self) -> range:
        """Those that are reported."""
        return range(FIRST_SEED, FIRST_SEED + self.num_seeds)


@dataclass(frozen=True)
class Measure:
    """A number for each run, by which arms are compared."""

    name: str
    """In tables, as a heading."""
    of: Callable[[Mapping[str, Any]], float]
    """From a run's outcome."""
    is_less_better: bool = False
    """Whether small numbers are good."""
    relative_to: str | None = None
    """The arm whose number it is divided by, seed by seed; none: as it is."""
    smallest_effect: float = 0.0
    """How large a difference has to be to count."""


@dataclass(frozen=True)
class Panel:
    """Arms that are compared with each other."""

    name: str
    """What they have in common."""
    arms: Mapping[str, Work]
    """By name, in the order of the table."""
    measures: Sequence[Measure]
    """The first is what the claim is about, the second what became of the units."""
    missing: Mapping[str, str]
    """Arms that belong here and were not run, and why."""
    notes: Sequence[str] = ()
    """What a reader has to know."""
    nothing: str = "none"
    """The arm without intervention."""
    optimizer: str = "optimizer reset"
    """The arm whose optimizer begins anew at each switch, and nothing else does."""

    def results(self, files: Results, seeds: Sequence[int]) -> dict[str, list[Result]]:
        """What there is of each arm."""
        return {name: files.of(Job(work, tuple(seeds))) for name, work in self.arms.items()}


@dataclass(frozen=True)
class Figure:
    """A figure of the paper."""

    name: str
    """On the command line."""
    claim: str
    """What the paper says with it."""
    panels: Callable[[Asked, Results], Sequence[Panel]]
    """Its parts, as far as they can be said with the runs that there are: a control as large as another arm's networks
    have become is among them once that arm is done."""

    def jobs(self, asked: Asked, files: Results) -> list[Job]:
        """What can be run now."""
        works = [work for panel in self.panels(asked, files) for work in panel.arms.values()]
        return jobs_of(dict.fromkeys(works), asked.seeds, side_by_side=SIDE_BY_SIDE)


Runs = Mapping[str, Sequence[Result]]
"""Arm -> its results."""


def scores_of(runs: Runs, measure: Measure) -> tuple[list[int], dict[str, Scores]]:
    """For each arm a number for each of the seeds that all have, and those seeds.

    Arms of which more than half failed have no number, so that they do not take the others theirs.
    """
    most = max(map(len, runs.values()), default=0)
    done = {
        name: {run.seed: run.outcome for run in of_arm}
        for name, of_arm in runs.items()
        if of_arm and len(of_arm) >= most / 2
    }
    seeds = sorted(set.intersection(*map(set, done.values()))) if done else []
    plain = {name: np.array([measure.of(own[seed]) for seed in seeds]) for name, own in done.items()}
    if measure.relative_to is None:
        return seeds, plain
    if measure.relative_to not in plain:
        return seeds, {}
    return seeds, {name: values / plain[measure.relative_to] for name, values in plain.items()}
