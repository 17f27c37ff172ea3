"""What a demonstration ends with: a table, a picture, and a sentence computed from the numbers.

Intervals are 95 % intervals of the mean over seeds by Student's t. With the few seeds of a demonstration a
bootstrap cannot leave the range between the lowest and the highest seed, and for three seeds that range
misses the true median once in four times.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean, stdev

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from neuronsurgery.demo.arms import ARMS, ArmName
from neuronsurgery.demo.digits import NUM_CLASSES
from neuronsurgery.demo.run import Run
from neuronsurgery.tables import render

__all__ = ["NUM_LAST_TASKS", "Estimate", "conclusion", "save_figure", "table"]

NUM_LAST_TASKS = 10
_COLUMNS = ("arm", "final", "area", "width", "weights", "operated", "frozen rows", "seconds")
_STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % quantiles for 2 to 10 seeds; more seeds take the last, so their intervals are a bit wide."""
_COLORS = {
    ArmName.NONE: "#999999",
    ArmName.RESET: "#e69f00",
    ArmName.WIDE: "#56b4e9",
    ArmName.WIDE_RESET: "#009e73",
    ArmName.KNIFE: "#d55e00",
}


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and half the length of its 95 % interval (nan for a single seed).

    >>> print(Estimate.of([0.9, 1.0]), Estimate.of([0.5]))
    0.95 ± 0.64 0.50
    """

    mean: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Estimates the mean from one value per seed."""
        if len(values) < 2:
            return cls(fmean(values), math.nan)
        quantile = _STUDENT_T[min(len(values), len(_STUDENT_T) + 1) - 2]
        return cls(fmean(values), quantile * stdev(values) / math.sqrt(len(values)))

    def __str__(self) -> str:
        return f"{self.mean:.2f}" if math.isnan(self.half) else f"{self.mean:.2f} ± {self.half:.2f}"


def table(runs: Sequence[Run]) -> str:
    """Returns the runs as a table, a row per arm with means over its seeds, and a legend."""
    rows = [_row(of_arm) for _, of_arm in _by_arm(runs)]
    return render(f"Learning {len(runs[0].accuracies)} tasks one after another", _COLUMNS, rows, _legend(runs))


def conclusion(runs: Sequence[Run]) -> str:
    """Returns a sentence that compares KNIFE's final accuracy with every other arm's, seed by seed."""
    finals = {arm: [_final(run) for run in of_arm] for arm, of_arm in _by_arm(runs)}
    knife = finals.pop(ArmName.KNIFE)
    over = f"95 %, {len(knife)} seeds, paired" if len(knife) > 1 else "one seed, no interval"
    leads = ", ".join(f"{_lead(knife, final)} over {arm.value}" for arm, final in finals.items())
    return f"KNIFE ends at {fmean(knife):.2f}, chance at {1 / NUM_CLASSES:.2f}; its lead ({over}) is {leads}."


def save_figure(runs: Sequence[Run], path: Path) -> None:
    """Writes the picture, accuracy after each task, as a line and a band over the seeds per arm."""
    figure = Figure(figsize=(8.0, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for arm, of_arm in _by_arm(runs):
        _draw(axes, arm, [run.accuracies for run in of_arm])
    axes.axhline(1 / NUM_CLASSES, color="black", linewidth=0.8, linestyle=":", label="chance")
    axes.set(xlabel="task", ylabel="accuracy after the task, on its images", ylim=(0.0, 1.02))
    num_seeds = len({run.seed for run in runs})
    band = f" (mean and range of {num_seeds} seeds)" if num_seeds > 1 else ""
    axes.set_title(f"Digits with labels drawn anew for each task{band}", loc="left")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150, format="png")


def _by_arm(runs: Iterable[Run]) -> Iterator[tuple[ArmName, list[Run]]]:
    for arm, of_arm in groupby(runs, key=lambda run: run.arm):
        yield arm, list(of_arm)


def _final(run: Run) -> float:
    return fmean(run.accuracies[-NUM_LAST_TASKS:])


def _row(runs: Sequence[Run]) -> list[object]:
    counts = (
        [run.network.num_units for run in runs],
        [run.network.num_weights for run in runs],
        [run.num_operated for run in runs],
        [run.network.num_frozen for run in runs],
        [run.seconds for run in runs],
    )
    return [
        runs[0].arm.value,
        str(Estimate.of([_final(run) for run in runs])),
        str(Estimate.of([fmean(run.accuracies) for run in runs])),
        *(round(fmean(count)) for count in counts),
    ]


def _legend(runs: Sequence[Run]) -> Iterator[str]:
    num_tasks, num_seeds = len(runs[0].accuracies), len({run.seed for run in runs})
    num_last = min(NUM_LAST_TASKS, num_tasks)
    over = f"{num_seeds} seeds, mean ± 95 % interval (Student's t)" if num_seeds > 1 else "1 seed, no interval"
    yield f"accuracy: on the task's own images, when the task ends; {over}"
    yield f"final: the last {num_last} tasks; area: all {num_tasks} tasks; width: units of each hidden layer"
    yield "weights: stored weights and biases, frozen ones included; seconds: processor time of one run"
    ran = {run.arm for run in runs}
    for name, arm in ARMS.items():
        yield f"{name.value}{'' if name in ran else ' (not run)'}: {arm.legend}"


def _lead(knife: Sequence[float], other: Sequence[float]) -> str:
    gain = Estimate.of([one - another for one, another in zip(knife, other, strict=True)])
    if math.isnan(gain.half):
        return f"{gain.mean:+.2f}"
    told = "" if abs(gain.mean) > gain.half else " (not told from zero)"
    return f"{gain.mean:+.2f} ± {gain.half:.2f}{told}"


def _draw(axes: Axes, arm: ArmName, accuracies: Sequence[Sequence[float]]) -> None:
    """Draws the mean over seeds as a line, the lowest to the highest seed as a band."""
    by_task = list(zip(*accuracies, strict=True))
    numbers = range(1, len(by_task) + 1)
    axes.plot(numbers, [fmean(values) for values in by_task], color=_COLORS[arm], label=arm.value)
    low, high = [min(values) for values in by_task], [max(values) for values in by_task]
    axes.fill_between(numbers, low, high, color=_COLORS[arm], alpha=0.25, linewidth=0)
