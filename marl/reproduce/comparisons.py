"""How a comparison is shown: what its runs say, tables with verdicts, and its pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from marl.reproduce.figures.figure import Measure, Panel, Runs, scores_of
from marl.reproduce.results import Result
from marl.reproduce.statistics import (
    Scores,
    estimate,
    interquartile_mean,
    performance_profile,
    probability_of_improvement,
    wilson,
)
from marl.reproduce.summaries import judged, summary
from marl.reproduce.verdict import Judgement

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw", "draw_curve", "line", "summary", "tables"]


def line(cells: Sequence[str]) -> str:
    """A row of a table."""
    return f"| {' | '.join(cells)} |"


def tables(panel: Panel, runs: Runs) -> Iterator[str]:
    """A row for each arm, with verdicts, and where tasks are solved or not another with each of them."""
    yield from _verdicts(panel, runs)
    if (each_task := panel.measures[0].each_task) and any(runs.values()):
        yield from ("", "Of the seeds those that have solved a task at its end, with the intervals of Wilson:", "")
        yield from _tasks(each_task, runs)


def _verdicts(panel: Panel, runs: Runs) -> Iterator[str]:
    first, units, *others = panel.measures
    columns = [f"{first.name}, mean", "interquartile mean", "better than none by", "than a fresh optimizer by"]
    columns += ["P(better than none)", "p", "verdict", f"{units.name}", "verdict on units"]
    yield line(["arm", *columns, *(measure.name for measure in others), "frozen rows", "s"])
    yield line(["---"] * (len(columns) + len(others) + 3))
    _, scores = scores_of(runs, first)
    on_first, on_units = judged(panel, runs, first), judged(panel, runs, units)
    for name, own in scores.items():
        cells = [str(estimate(own)), str(estimate(own, interquartile_mean))]
        cells += _judgement(on_first.get(name), _chance(scores, own, panel, first))
        cells += [_plain(runs, units, name), _verdict(on_units.get(name))]
        cells += [_plain(runs, measure, name) for measure in others]
        outcomes = [run.outcome for run in runs[name]]
        rows, seconds = fmean(sum(each["rows"].values()) for each in outcomes), fmean(e["seconds"] for e in outcomes)
        yield line([name, *cells, f"{rows:.0f}", f"{seconds:.1f}"])
    for name, reason in panel.missing.items():
        yield line([name, f"not run: {reason}", *[""] * (len(columns) + len(others) + 1)])


def _tasks(each_task: Callable[[Mapping[str, Any]], Mapping[str, bool]], runs: Runs) -> Iterator[str]:
    solved = {name: [each_task(run.outcome) for run in of_arm] for name, of_arm in runs.items() if of_arm}
    tasks = list(next(iter(solved.values()))[0])
    yield line(["arm", *tasks])
    yield line(["---"] * (1 + len(tasks)))
    for name, of_seeds in solved.items():
        yield line([name, *(str(wilson(sum(each[task] for each in of_seeds), len(of_seeds))) for task in tasks)])


def _judgement(found: Judgement | None, chance: str) -> list[str]:
    if found is None:
        return ["", "", "", "", ""]
    return [str(found.to_nothing), str(found.to_optimizer), chance, f"{found.p_value:.3f}", found.verdict.value]


def _chance(scores: Mapping[str, Scores], own: Scores, panel: Panel, measure: Measure) -> str:
    if panel.nothing not in scores:
        return ""
    pair = (own, scores[panel.nothing])
    return str(probability_of_improvement(*(pair[::-1] if measure.is_less_better else pair)))


def _plain(runs: Runs, measure: Measure, name: str) -> str:
    return str(estimate(scores_of(runs, measure)[1][name]))


def _verdict(found: Judgement | None) -> str:
    return "" if found is None else found.verdict.value


# -- pictures

SHOWN = ("none", "optimizer reset", "fresh networks", "KNIFE, the paper's reading", "KNIFE, best setting", "KNIFE")
"""Arms whose way through the tasks is drawn."""

FAR = 10
"""Where scores are that many times their median, as of an arm that diverges, axes are logarithmic."""


def draw(axes: Sequence[Axes], panel: Panel, runs: Runs) -> None:
    """Draw intervals, profiles, and what was measured over time, into three axes."""
    intervals, profiles, ways = axes
    measure = panel.measures[0]
    _, scores = scores_of(runs, measure)
    if not scores:
        return
    _draw_intervals(intervals, scores)
    intervals.set_title(f"{panel.name}: {measure.name}", fontsize=9)
    thresholds, scale = _thresholds(np.concatenate(list(scores.values())))
    for name in (each for each in SHOWN if each in scores):
        profiles.plot(thresholds, performance_profile(scores[name], thresholds), label=name)
        if measure.curve:
            draw_curve(ways, panel, runs[name], measure.curve)
    profiles.set_xlabel(f"{measure.name} above")
    profiles.set_ylabel("share of seeds")
    profiles.legend(fontsize=6)
    ways.set_ylabel(measure.curve or "")
    for set_scale in (intervals.set_xscale, profiles.set_xscale, ways.set_yscale):
        set_scale(scale)


def _draw_intervals(axes: Axes, scores: Mapping[str, Scores]) -> None:
    places = range(len(scores), 0, -1)
    for place, (name, own) in zip(places, scores.items(), strict=True):
        found, color = estimate(own), "#d55e00" if name.startswith("KNIFE") else "#0072b2"
        axes.plot([found.low, found.high], [place, place], color=color, linewidth=6, alpha=0.4)
        axes.plot([found.value], [place], marker="|", markersize=9, markeredgewidth=2, color=color)
    axes.set_yticks(list(places), list(scores), fontsize=7)


def _thresholds(scores: Scores) -> tuple[Scores, Literal["linear", "log"]]:
    """Of a profile, from a little below all scores on, and the scale that shows them."""
    least, most = scores.min(), scores.max()
    if least > 0 and most > FAR * np.median(scores):
        return np.geomspace(0.99 * least, most, 60), "log"
    return np.linspace(least - 0.01 * ((most - least) or 1), most, 60), "linear"


def draw_curve(axes: Axes, panel: Panel, runs: Sequence[Result], name: str, **style: Any) -> None:
    """Draw something over time, the mean over seeds; nothing where the looks at these runs lack it."""
    looks = [run.outcome["looks"] for run in runs]
    length = max(look["update"] for look in looks[0])
    times = [length * look["task"] + look["update"] for look in looks[0]]
    if all(name in look for of_seed in looks for look in of_seed):
        axes.plot(times, np.mean([[look[name] for look in of_seed] for of_seed in looks], axis=0), linewidth=1, **style)
    axes.set_xlabel(panel.unit_of_time)
