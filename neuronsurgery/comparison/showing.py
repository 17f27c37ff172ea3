"""What a comparison ends with: a table of methods, the settings that won, and a figure of intervals."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from neuronsurgery.comparison.arms import ARMS
from neuronsurgery.comparison.benchmarks import BENCHMARKS
from neuronsurgery.comparison.planning import Outcome
from neuronsurgery.comparison.statistics import Estimate, Scores, estimate, interquartile_mean, mean

__all__ = ["page", "save_figure"]


def page(outcome: Outcome) -> str:
    """The outcome in Markdown: scores, then what they were tuned over and what won."""
    return "\n".join([*_scores_table(outcome), "", *_legend(outcome), "", *_settings_table(outcome)]) + "\n"


def save_figure(outcome: Outcome, path: Path) -> None:
    """Write the figure: for each benchmark, and over all, an interval for each method."""
    columns = [*outcome.comparison.benchmarks, "all"]
    figure = Figure(figsize=(2.6 * len(columns) + 2.0, 0.32 * len(outcome.comparison.arms) + 1.2), layout="constrained")
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, column in zip(panels, columns, strict=True):
        _draw(axes, column, {arm: _estimate(outcome, arm, column) for arm in outcome.comparison.arms})
    figure.savefig(path, dpi=150, format="png")


def scores_of(outcome: Outcome, arm: str, benchmarks: tuple[str, ...]) -> Scores:
    """The scores of an arm, (num_seeds, num_benchmarks)."""
    return np.array([[run.score for run in outcome.runs[benchmark, arm]] for benchmark in benchmarks]).T


def _estimate(outcome: Outcome, arm: str, column: str) -> Estimate:
    """The mean on a benchmark, or the interquartile mean over all."""
    if column == "all":
        return estimate(scores_of(outcome, arm, outcome.comparison.benchmarks), interquartile_mean)
    return estimate(scores_of(outcome, arm, (column,)), mean)


def _scores_table(outcome: Outcome) -> Iterator[str]:
    benchmarks = outcome.comparison.benchmarks
    yield _line(["method", *benchmarks, "all", "weights", "multiplications", "seconds"])
    yield _line(["---"] * (len(benchmarks) + 5))
    for arm in outcome.comparison.arms:
        estimates = [str(_estimate(outcome, arm, column)) for column in (*benchmarks, "all")]
        runs = [run for benchmark in benchmarks for run in outcome.runs[benchmark, arm]]
        weights = fmean(run.size.weights / BENCHMARKS[run.job.benchmark].shape.size.weights for run in runs)
        products = fmean(
            run.size.multiplications / BENCHMARKS[run.job.benchmark].shape.size.multiplications for run in runs
        )
        costs = [f"{weights:.2f}", f"{products:.2f}", f"{fmean(run.seconds for run in runs):.0f}"]
        yield _line([arm, *estimates, *costs])


def _legend(outcome: Outcome) -> Iterator[str]:
    compared = outcome.comparison
    yield (
        f"Means over {compared.num_seeds} seeds of the second half of the tasks, `all`: the interquartile mean over "
        "all benchmarks; in brackets 95 % intervals by the stratified bootstrap over seeds."
    )
    for name in compared.benchmarks:
        benchmark, scale = BENCHMARKS[name], compared.scale(name)
        sizes = ", ".join(map(str, benchmark.shape.hidden))
        yield (
            f"`{name}`: {benchmark.measures}; {scale.num_tasks} tasks of {scale.num_steps} steps, batches of "
            f"{scale.batch_size}, hidden layers of {sizes}."
        )
    yield (
        "`weights`: stored at the end, frozen ones included, and `multiplications` of a training step, in the mean "
        "over tasks, both as multiples of the untouched network; `seconds`: processor time of a run."
    )


def _settings_table(outcome: Outcome) -> Iterator[str]:
    compared = outcome.comparison
    number = len(compared.settings(next(iter(ARMS.values()))))
    yield f"Each method was tuned over {number} settings on {compared.num_tuning_seeds} other seeds; what won:"
    yield ""
    yield _line(["method", "learning rates", "tuned", "values", *compared.benchmarks])
    yield _line(["---"] * (len(compared.benchmarks) + 4))
    for name in compared.arms:
        settings = compared.settings(ARMS[name])
        rates, values = ({s.rate for s in settings}, {s.value for s in settings})
        tried = [_listed(rates), ARMS[name].tunes or "-", _listed(values) if ARMS[name].tunes else "-"]
        won = [outcome.chosen[benchmark, name] for benchmark in compared.benchmarks]
        shown = [f"{each.rate:g}, {each.value:g}" if ARMS[name].tunes else f"{each.rate:g}" for each in won]
        yield _line([name, *tried, *shown])


def _listed(numbers: set[float]) -> str:
    return ", ".join(f"{each:g}" for each in sorted(numbers))


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _draw(axes: Axes, column: str, estimates: dict[str, Estimate]) -> None:
    places = range(len(estimates), 0, -1)
    for place, (arm, each) in zip(places, estimates.items(), strict=True):
        color = "#d55e00" if arm == "KNIFE" else "#0072b2"
        axes.plot([each.low, each.high], [place, place], color=color, linewidth=6, alpha=0.4, solid_capstyle="butt")
        axes.plot([each.value], [place], marker="|", markersize=9, markeredgewidth=2, color=color)
    axes.set_yticks(list(places), list(estimates))
    axes.set_title("all (interquartile mean)" if column == "all" else column, fontsize=10)
    axes.grid(axis="x", alpha=0.3)
