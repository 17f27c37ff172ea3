"""Reproducing a figure, from its runs to its page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from marl.reproduce.engines import Ended, Engine
from marl.reproduce.figures.figure import Asked, Figure
from marl.reproduce.figures.tuning import tuning_jobs
from marl.reproduce.results import Job, Results
from marl.reproduce.showing import page, save_picture
from marl.reproduce.sweep import Progress, silent, sweep

__all__ = ["RUNS", "Reproduced", "Reproducing", "reproduce", "tune"]

RUNS = "runs"
"""Where the runs of all figures are, in the folder that somebody asked for."""

OnProgress = Callable[[Progress], None]


@dataclass(frozen=True)
class Reproduced:
    """A figure, as far as its runs could be done."""

    page: Path
    """Its tables and verdicts."""
    picture: Path
    """Its picture."""
    failed: tuple[Ended, ...]
    """Jobs that failed each time."""


@dataclass(frozen=True)
class Reproducing:
    """How and where."""

    folder: Path
    """Runs lie in `runs`, shared by all figures; what is shown in a folder for each scale."""
    engine: Engine
    """What runs the jobs."""
    on_progress: OnProgress = silent
    """Called as they end."""

    @property
    def files(self) -> Results:
        """The runs."""
        return Results(self.folder / RUNS)


def reproduce(figure: Figure, asked: Asked, how: Reproducing) -> Reproduced:
    """Do what runs are missing, and write page and picture; runs that fail are left out of them."""
    failed = _swept(lambda: figure.jobs(asked, how.files), how)
    shown = how.folder / asked.scale
    shown.mkdir(parents=True, exist_ok=True)
    path, picture = shown / f"{figure.name}.md", shown / f"{figure.name}.png"
    path.write_text(page(figure, asked, how.files), encoding="utf-8")
    save_picture(figure, asked, how.files, picture)
    return Reproduced(path, picture, failed)


def tune(asked: Asked, how: Reproducing) -> tuple[Ended, ...]:
    """Do the runs of the grid from which figures take the best settings; returns what failed."""
    return _swept(lambda: tuning_jobs(asked, how.files), how)


def _swept(jobs: Callable[[], list[Job]], how: Reproducing) -> tuple[Ended, ...]:
    """Sweep for as long as what was done says what else there is to do."""
    known: set[Job] = set()
    failed: tuple[Ended, ...] = ()
    while not known.issuperset(now := jobs()):
        known.update(now)
        failed = sweep(now, how.files, how.engine, on_progress=how.on_progress).failed
    return failed
