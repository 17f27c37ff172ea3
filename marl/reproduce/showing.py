"""What a reproduced figure ends with: a page of tables with verdicts, and a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from marl.errors import MissingExtraError
from marl.reproduce.figures.figure import Asked, Figure, Measure, Panel, Runs, scores_of
from marl.reproduce.results import Results
from marl.reproduce.statistics import (
    Scores,
    estimate,
    interquartile_mean,
    performance_profile,
    probability_of_improvement,
)
from marl.reproduce.summaries import judged, summary
from marl.reproduce.verdict import Judgement

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["legend", "line", "page", "save_picture", "sections"]


def page(figure: Figure, asked: Asked, files: Results) -> str:
    """A figure's claim, and a table with verdicts for each of its panels, in Markdown."""
    lines = [f"# {figure.name}, {asked.scale}", "", f"Claim: {figure.claim}", ""]
    return "\n".join([*lines, *sections(figure, asked, files, level=2), legend()]) + "\n"


def sections(figure: Figure, asked: Asked, files: Results, *, level: int) -> Iterator[str]:
    """A heading for each panel, what its runs say, the table and the notes, line by line."""
    for panel in figure.panels(asked, files):
        runs = panel.results(files, asked.seeds)
        said, notes = list(summary(panel, runs)), list(_notes(panel, runs))
        yield from (f"{'#' * level} {panel.name}", "", *said, *[""] * bool(said), *_table(panel, runs), "")
        yield from (each for note in notes for each in (note, ""))


def legend() -> str:
    """How to read the tables."""
    return (
        "In brackets 95 % intervals by the bootstrap over seeds. Differences are paired by seed and positive where the "
        "arm is better; p is that of being better than both controls, adjusted for the number of arms (Holm). "
        "*Confirmed* needs both intervals above zero and p < 0.05; *contradicted* one below zero; else the question is "
        "open. Units are judged in the same way: fewer that are stagnant at the ends of the later tasks is better, and "
        "differences below one unit in twenty do not count. s: processor time of a run."
    )


def line(cells: Sequence[str]) -> str:
    """A row of a table."""
    return f"| {' | '.join(cells)} |"


def save_picture(figure: Figure, asked: Asked, files: Results, path: Path) -> None:
    """Draw a column for each panel: intervals, profiles, and what was measured over time.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure as Canvas
    except ModuleNotFoundError:
        raise MissingExtraError.of("matplotlib") from None
    panels = figure.panels(asked, files)
    num_arms = max(len(panel.arms) for panel in panels)
    size = (5.2 * len(panels), 0.26 * num_arms + 6.5)
    canvas = Canvas(figsize=size, layout="constrained")
    axes = canvas.subplots(3, len(panels), squeeze=False, height_ratios=(0.26 * num_arms + 0.5, 2.6, 2.6))
    for column, panel in zip(axes.T, panels, strict=True):
        runs = {name: each for name, each in panel.results(files, asked.seeds).items() if each}
        if runs:
            _draw(column, panel, runs)
    canvas.savefig(path, dpi=120, format="png")


# -- tables


def _table(panel: Panel, runs: Runs) -> Iterator[str]:
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


def _notes(panel: Panel, runs: Runs) -> Iterator[str]:
    yield from panel.notes
    done = [run for of_arm in runs.values() for run in of_arm]
    if not done:
        yield "No runs yet."
        return
    seeds, _ = scores_of(runs, panel.measures[0])
    commits = sorted({run.provenance.commit[:10] for run in done})
    versions = sorted({run.provenance.version for run in done})
    seconds = sum(run.outcome["seconds"] for run in done)
    yield (
        f"{len(seeds)} seeds; {len(done)} runs took {seconds / 3600:.2f} hours of processor time; version "
        f"{', '.join(versions)}, commit {', '.join(commits)}."
    )


# -- pictures

SHOWN = ("none", "optimizer reset", "fresh networks", "KNIFE, the paper's reading", "KNIFE, best setting", "KNIFE")
"""Arms whose way through the tasks is drawn."""


def _draw(axes: Sequence[Axes], panel: Panel, runs: Runs) -> None:
    intervals, profiles, ways = axes
    measure = panel.measures[0]
    _, scores = scores_of(runs, measure)
    if not scores:
        return
    places = range(len(scores), 0, -1)
    for place, (name, own) in zip(places, scores.items(), strict=True):
        found, color = estimate(own), "#d55e00" if name.startswith("KNIFE") else "#0072b2"
        intervals.plot([found.low, found.high], [place, place], color=color, linewidth=6, alpha=0.4)
        intervals.plot([found.value], [place], marker="|", markersize=9, markeredgewidth=2, color=color)
    intervals.set_yticks(list(places), list(scores), fontsize=7)
    intervals.set_title(f"{panel.name}: {measure.name}", fontsize=9)
    taken = np.concatenate(list(scores.values()))
    thresholds = np.linspace(taken.min() - 1e-9, taken.max(), 60)
    shown = [name for name in SHOWN if name in scores]
    for name in shown:
        profiles.plot(thresholds, performance_profile(scores[name], thresholds), label=name)
        looks = [run.outcome["looks"] for run in runs[name]]
        _draw_way(ways, looks, "error" if measure.is_less_better else "solved")
    profiles.set_xlabel(f"{measure.name} above")
    profiles.set_ylabel("share of seeds")
    profiles.legend(fontsize=6)
    ways.set_xlabel("updates")
    ways.set_ylabel("error" if measure.is_less_better else "share solved")


def _draw_way(axes: Axes, looks: Sequence[Sequence[Mapping[str, Any]]], name: str) -> None:
    length = max(look["update"] for look in looks[0])
    updates = [length * look["task"] + look["update"] for look in looks[0]]
    axes.plot(updates, np.mean([[look[name] for look in of_seed] for of_seed in looks], axis=0), linewidth=1)
