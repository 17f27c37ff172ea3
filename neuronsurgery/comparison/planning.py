"""Which runs a comparison is made of, in three rounds, each on several processes; what has a file is not run again.

First every method is tuned: each of its settings, on a few seeds, and the best mean score wins. Then the controls that
have as much as KNIFE's network: their width is known now, and they are tuned as well. Last come other seeds, with what
won. Seeds of the last round are not those of the first.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean

from neuronsurgery.comparison.arms import ARMS, Arm, Setting
from neuronsurgery.comparison.benchmarks import BENCHMARKS, Scale
from neuronsurgery.comparison.networks import Size
from neuronsurgery.comparison.running import Job, Run, stored

__all__ = ["Comparison", "Outcome", "compare", "num_runs"]

FIRST_TUNING_SEED = 1000
REFERENCE = "KNIFE"
"""The method that controls have as much as."""


@dataclass(frozen=True)
class Comparison:
    """What is compared, on what, and how often; raises ValueError for what cannot be.

    `shrink` divides the number of tasks and the steps of each: a look at whether all runs, not at what comes out.
    """

    arms: tuple[str, ...] = tuple(ARMS)
    benchmarks: tuple[str, ...] = tuple(BENCHMARKS)
    num_seeds: int = 10
    num_tuning_seeds: int = 2
    shrink: int = 1
    num_settings: int | None = None
    """How many of the settings are tried; None: all."""

    def __post_init__(self) -> None:
        for asked, known in ((self.arms, ARMS), (self.benchmarks, BENCHMARKS)):
            unknown = [name for name in asked if name not in known]
            if unknown or not asked:
                raise ValueError(f"{', '.join(unknown) or 'nothing'} was asked for; there are {', '.join(known)}")
        if any(ARMS[arm].equals for arm in self.arms) and REFERENCE not in self.arms:
            raise ValueError(f"a control of {REFERENCE}'s size was asked for without {REFERENCE}")

    def scale(self, benchmark: str) -> Scale:
        """How long a benchmark is here."""
        full = BENCHMARKS[benchmark].scale
        num_tasks, num_steps = max(2, full.num_tasks // self.shrink), max(4, full.num_steps // self.shrink)
        return full if self.shrink == 1 else replace(full, num_tasks=num_tasks, num_steps=num_steps)

    def settings(self, arm: Arm) -> tuple[Setting, ...]:
        """What an arm is tuned over."""
        return arm.settings[: self.num_settings]


@dataclass(frozen=True)
class Outcome:
    """The runs that count, and the settings that won, by benchmark and arm."""

    comparison: Comparison
    chosen: Mapping[tuple[str, str], Setting]
    runs: Mapping[tuple[str, str], Sequence[Run]]


def num_runs(comparison: Comparison) -> int:
    """How many runs a comparison is made of."""
    tuned = sum(len(comparison.settings(ARMS[arm])) for arm in comparison.arms) * comparison.num_tuning_seeds
    return len(comparison.benchmarks) * (tuned + len(comparison.arms) * comparison.num_seeds)


def compare(
    comparison: Comparison, folder: Path, *, num_workers: int, on_run: Callable[[Run], None] = lambda run: None
) -> Outcome:
    """Run all that has no file in the folder yet, on `num_workers` processes (1: in this one), and return all."""
    folder.mkdir(parents=True, exist_ok=True)
    do = partial(_done, folder=str(folder), num_workers=num_workers, on_run=on_run)
    methods = [arm for arm in comparison.arms if not ARMS[arm].equals]
    controls = [arm for arm in comparison.arms if ARMS[arm].equals]
    hidden = {(b, arm): BENCHMARKS[b].shape.hidden for b, arm in product(comparison.benchmarks, methods)}
    tuned = do(_tuning(comparison, methods, hidden))
    hidden |= {(b, arm): _width(b, arm, tuned) for b, arm in product(comparison.benchmarks, controls)}
    tuned += do(_tuning(comparison, controls, hidden))
    chosen = {pair: _best(tuned, *pair) for pair in hidden}
    jobs = [
        Job(benchmark, arm, chosen[benchmark, arm], seed, comparison.scale(benchmark), hidden[benchmark, arm])
        for benchmark, arm in product(comparison.benchmarks, comparison.arms)
        for seed in range(comparison.num_seeds)
    ]
    runs: dict[tuple[str, str], list[Run]] = {}
    for each in do(jobs):
        runs.setdefault((each.job.benchmark, each.job.arm), []).append(each)
    return Outcome(comparison, chosen, runs)


Hidden = Mapping[tuple[str, str], tuple[int, ...]]


def _tuning(comparison: Comparison, arms: Iterable[str], hidden: Hidden) -> list[Job]:
    return [
        Job(benchmark, arm, setting, FIRST_TUNING_SEED + seed, comparison.scale(benchmark), hidden[benchmark, arm])
        for benchmark, arm in product(comparison.benchmarks, arms)
        for setting in comparison.settings(ARMS[arm])
        for seed in range(comparison.num_tuning_seeds)
    ]


def _best(tuned: Sequence[Run], benchmark: str, arm: str) -> Setting:
    """The setting of the best mean score; of equal ones the first."""
    scores: dict[Setting, list[float]] = {}
    for each in tuned:
        if (each.job.benchmark, each.job.arm) == (benchmark, arm):
            scores.setdefault(each.job.setting, []).append(each.score)
    return max(scores, key=lambda setting: fmean(scores[setting]))


def _width(benchmark: str, arm: str, tuned: Sequence[Run]) -> tuple[int, ...]:
    """The hidden layers of a control that has as much as the reference, with its best setting, had in the mean."""
    best = _best(tuned, benchmark, REFERENCE)
    sizes = [
        each.size
        for each in tuned
        if (each.job.benchmark, each.job.arm, each.job.setting) == (benchmark, REFERENCE, best)
    ]
    wanted = ARMS[arm].equals
    return BENCHMARKS[benchmark].shape.widened(**{wanted: getattr(Size.mean(sizes), wanted)}).hidden


def _done(jobs: Sequence[Job], *, folder: str, num_workers: int, on_run: Callable[[Run], None]) -> list[Run]:
    """The runs of the jobs, in their order; `on_run` is called as they end."""
    found: dict[Job, Run] = {}
    for each in _ended(jobs, folder, num_workers):
        on_run(each)
        found[each.job] = each
    return [found[job] for job in jobs]


def _ended(jobs: Sequence[Job], folder: str, num_workers: int) -> Iterator[Run]:
    if num_workers == 1:
        yield from (stored(job, folder) for job in jobs)
        return
    # A fork of a process that has used torch's threads can hang; a spawned process starts clean.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=context) as processes:
        for future in as_completed([processes.submit(stored, job, folder) for job in jobs]):
            yield future.result()
