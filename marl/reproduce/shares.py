"""How shares of units are shown: no arm is judged, each measure has its interval."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from marl.reproduce.comparisons import draw_curve, line
from marl.reproduce.figures.figure import Panel, Runs, scores_of
from marl.reproduce.statistics import estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw", "summary", "table"]

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
STYLES = ("-", "--", ":", "-.")


def summary(panel: Panel, runs: Runs) -> Iterator[str]:
    """Nothing: the table says it all."""
    yield from ()


def table(panel: Panel, runs: Runs) -> Iterator[str]:
    """A row for each arm, a column for each measure."""
    yield line(["", *(measure.name for measure in panel.measures), "seeds", "s"])
    yield line(["---"] * (len(panel.measures) + 3))
    for name, own in runs.items():
        if own:
            cells = [str(estimate(scores_of({name: own}, measure)[1][name])) for measure in panel.measures]
            yield line([name, *cells, str(len(own)), f"{fmean(run.outcome['seconds'] for run in own):.1f}"])


def draw(axes: Sequence[Axes], panel: Panel, runs: Runs) -> None:
    """Draw each measure with its interval for all arms, and its curves over time; the third of the axes stays empty."""
    intervals, curves, unused = axes
    unused.set_axis_off()
    names = list(runs)
    for number, (measure, color) in enumerate(zip(panel.measures, COLORS, strict=False)):
        for place, name in enumerate(names):
            found = estimate(scores_of({name: runs[name]}, measure)[1][name])
            height = len(names) - place - number / (len(panel.measures) + 1)
            label = measure.name if place == 0 else None
            intervals.plot([found.low, found.high], [height, height], color=color, linewidth=3, alpha=0.5, label=label)
            intervals.plot([found.value], [height], marker="|", markersize=6, color=color)
            if measure.curve:
                style = STYLES[place % len(STYLES)]
                draw_curve(curves, panel, runs[name], measure.curve, color=color, linestyle=style)
    intervals.set_yticks([len(names) - place - 0.3 for place in range(len(names))], names, fontsize=7)
    intervals.set_title(panel.name, fontsize=9)
    intervals.legend(fontsize=6)
    curves.set_ylabel("share of units")
    curves.set_title("; ".join(f"{style} {name}" for name, style in zip(names, STYLES, strict=False)), fontsize=6)
