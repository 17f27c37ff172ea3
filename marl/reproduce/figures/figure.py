"""What a figure is: a claim, panels of arms that are compared on the same seeds, and measures of how they did."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from marl.errors import SettingsError
from marl.reproduce.results import Job, Result, Results, Work, jobs_of
from marl.reproduce.statistics import Scores

__all__ = ["Asked", "Figure", "Kind", "Measure", "Panel", "Runs", "Scale", "scores_of"]

Scale = Literal["smoke", "small", "paper"]
"""`smoke` shows that all runs, `small` is for two cores and an evening, `paper` for a cluster."""

Kind = Literal["comparison", "shares"]
"""Of panels: arms that are judged, or only measured."""

NUM_SEEDS: dict[Scale, int] = {"smoke": 2, "small": 30, "paper": 100}
FIRST_SEED = 1000
"""Of what is reported; what is tuned has the seeds from 0 on."""


@dataclass(frozen=True)
class Asked:
    """What somebody asked for."""

    scale: Scale
    """How much is run."""
    num_seeds: int
    """Seeds of what is reported."""
    is_default: bool = True
    """Whether nobody has asked for that number, so that what costs more may be content with fewer."""

    @staticmethod
    def of(scale: str, num_seeds: int | None = None) -> Asked:
        """A scale by name, with its own number of seeds unless another is given.

        Raises:
            SettingsError: there is no such scale, or the seeds are fewer than two.

        >>> Asked.of("small")
        Asked(scale='small', num_seeds=30, is_default=True)
        """
        if scale not in get_args(Scale):
            raise SettingsError(f"there is no scale {scale!r}; choose one of {', '.join(map(repr, get_args(Scale)))}")
        known: Scale = scale  # type: ignore[assignment]
        number = NUM_SEEDS[known] if num_seeds is None else num_seeds
        if number < 2:
            raise SettingsError(f"asked for {number} seeds: an interval needs at least 2")
        return Asked(known, number, num_seeds is None)

    @property
    def seeds(self) -> range:
        """Those that are reported."""
        return self.seeds_of(self.num_seeds)

    def seeds_of(self, num_seeds: int) -> range:
        """Those of what has another number of seeds unless one was asked for.

        >>> Asked.of("small").seeds_of(3), Asked.of("small", 5).seeds_of(3)
        (range(1000, 1003), range(1000, 1005))
        """
        return range(FIRST_SEED, FIRST_SEED + (num_seeds if self.is_default else self.num_seeds))


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
    curve: str | None = None
    """What is drawn over time, by its name in each look; none: nothing."""
    less: str | None = None
    """The arm whose number is taken off, seed by seed, where numbers may be zero; none: as it is."""
    each_task: Callable[[Mapping[str, Any]], Mapping[str, bool]] | None = None
    """Of what counts solved tasks, the tasks by name and whether a run has solved them; none: nothing is counted."""


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
    kind: Kind = "comparison"
    """Whether arms are judged against these two, or only measured."""
    num_seeds: Mapping[str, int] = field(default_factory=dict)
    """Seeds of an arm unless a number is asked for; of those that are not named as many as the scale has."""
    unit_of_time: str = "updates"
    """Of `update` in the looks at a run."""

    def seeds(self, asked: Asked, arm: str) -> tuple[int, ...]:
        """Those that are reported of an arm."""
        return tuple(asked.seeds_of(self.num_seeds.get(arm, asked.num_seeds)))

    def results(self, files: Results, asked: Asked) -> dict[str, list[Result]]:
        """What there is of each arm."""
        return {name: files.of(Job(work, self.seeds(asked, name))) for name, work in self.arms.items()}

    def jobs(self, asked: Asked) -> Iterator[Job]:
        """What it is made from."""
        for name, work in self.arms.items():
            yield from jobs_of([work], self.seeds(asked, name), side_by_side=work.side_by_side)


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
        return list(dict.fromkeys(job for panel in self.panels(asked, files) for job in panel.jobs(asked)))


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
    for other, relation in ((measure.relative_to, np.divide), (measure.less, np.subtract)):
        if other is not None:
            plain = {name: relation(values, plain[other]) for name, values in plain.items()} if other in plain else {}
    return seeds, plain
