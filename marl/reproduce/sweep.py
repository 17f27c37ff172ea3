"""A sweep: all runs that a figure needs, each done once, whatever happens in between.

What has a file is not run again, so that a sweep which was killed goes on where it was. A run that fails is tried
again when all others were; what fails each time is reported, and the others count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from marl.reproduce.engines import Ended, Engine
from marl.reproduce.results import Job, Provenance, Results

__all__ = ["Progress", "Swept", "sweep"]


@dataclass(frozen=True)
class Progress:
    """How far a sweep has come."""

    num_runs: int
    """Runs there are in all."""
    num_done: int
    """Runs that have a file."""
    num_failed: int
    """Runs that failed and will be tried again, or will not."""
    latest: Ended | None = None
    """The job that ended last; none at the beginning."""


@dataclass(frozen=True)
class Swept:
    """What a sweep leaves behind beside its files."""

    num_new: int
    """Runs that were done now."""
    failed: tuple[Ended, ...]
    """Jobs that failed each time."""


OnProgress = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    """Say nothing."""


def sweep(
    jobs: Sequence[Job], results: Results, engine: Engine, *, num_retries: int = 1, on_progress: OnProgress = silent
) -> Swept:
    """Do what has no file yet.

    A job that failed is tried again `num_retries` times. `on_progress` is called at the beginning and after each job.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from marl.reproduce.engines import InProcess
    >>> sweep([], Results(Path(tempfile.mkdtemp())), InProcess())
    Swept(num_new=0, failed=())
    """
    waiting = [left for left in map(results.missing, jobs) if left is not None]
    num_runs, num_missing = sum(len(job.seeds) for job in jobs), _num_runs(waiting)
    do, num_left = partial(results.do, provenance=Provenance.here()), num_missing
    on_progress(Progress(num_runs, num_runs - num_left, 0))
    failed: list[Ended] = []
    for _ in range(1 + num_retries):
        failed = []
        for ended in engine.run(waiting, do):
            left = results.missing(ended.job)
            if left is not None:
                failed.append(Ended(left, ended.error or "it left no file"))
            num_left -= len(ended.job.seeds) - _num_runs([left] if left else [])
            on_progress(Progress(num_runs, num_runs - num_left, _num_runs([each.job for each in failed]), ended))
        waiting = [each.job for each in failed]
        if not waiting:
            break
    return Swept(num_missing - num_left, tuple(failed))


def _num_runs(jobs: Sequence[Job]) -> int:
    return sum(len(job.seeds) for job in jobs)
