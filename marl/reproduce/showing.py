"""What a reproduced figure ends with: a page of tables with verdicts, and a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from marl.errors import MissingExtraError
from marl.reproduce import comparisons, shares
from marl.reproduce.figures.figure import Asked, Figure, Kind, Panel, Runs
from marl.reproduce.results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["legend", "page", "save_picture", "sections"]


@dataclass(frozen=True)
class View:
    """How a kind of panel is shown."""

    summary: Callable[[Panel, Runs], Iterator[str]]
    """What its runs say, in a few lines."""
    tables: Callable[[Panel, Runs], Iterator[str]]
    """Its numbers, in Markdown."""
    draw: Callable[[Sequence[Axes], Panel, Runs], None]
    """Its pictures, into three axes."""


VIEWS: Mapping[Kind, View] = {
    "comparison": View(comparisons.summary, comparisons.tables, comparisons.draw),
    "shares": View(shares.summary, shares.table, shares.draw),
}


def page(figure: Figure, asked: Asked, files: Results) -> str:
    """A figure's claim, and tables with verdicts for each of its panels, in Markdown."""
    lines = [f"# {figure.name}, {asked.scale}", "", f"Claim: {figure.claim}", ""]
    return "\n".join([*lines, *sections(figure, asked, files, level=2), legend()]) + "\n"


def sections(figure: Figure, asked: Asked, files: Results, *, level: int) -> Iterator[str]:
    """A heading for each panel, what its runs say, the table and the notes, line by line."""
    for panel in figure.panels(asked, files):
        runs, view = panel.results(files, asked), VIEWS[panel.kind]
        said, notes = list(view.summary(panel, runs)), list(_notes(panel, runs))
        yield from (f"{'#' * level} {panel.name}", "", *said, *[""] * bool(said), *view.tables(panel, runs), "")
        yield from (each for note in notes for each in (note, ""))


def legend() -> str:
    """How to read the tables."""
    return (
        "In brackets 95 % intervals by the bootstrap over seeds. Differences are paired by seed and positive where "
        "the arm is better; p is that of being better than both controls, adjusted for the number of arms (Holm). "
        "*Confirmed* needs both intervals above zero and p < 0.05, *contradicted* one below zero as certainly; else "
        "the question is open. Units are judged in the same way: fewer that are stagnant at the ends of the later "
        "tasks is better, and differences below one unit in twenty do not count. s: processor time of a run."
    )


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
    num_arms = max(8, *(len(panel.arms) for panel in panels))
    size = (5.2 * len(panels), 0.26 * num_arms + 6.5)
    canvas = Canvas(figsize=size, layout="constrained")
    axes = canvas.subplots(3, len(panels), squeeze=False, height_ratios=(0.26 * num_arms + 0.5, 2.6, 2.6))
    for column, panel in zip(axes.T, panels, strict=True):
        runs = {name: each for name, each in panel.results(files, asked).items() if each}
        if runs:
            VIEWS[panel.kind].draw(column, panel, runs)
        for each in column:
            each.set_visible(each.has_data())
    canvas.savefig(path, dpi=120, format="png", bbox_inches="tight")


def _notes(panel: Panel, runs: Runs) -> Iterator[str]:
    yield from panel.notes
    done = [run for of_arm in runs.values() for run in of_arm]
    if not done:
        yield "No runs yet."
        return
    num_seeds = max(map(len, runs.values()))
    commits = sorted({run.provenance.commit[:10] for run in done})
    versions = sorted({run.provenance.version for run in done})
    seconds = sum(run.outcome["seconds"] for run in done)
    yield (
        f"{num_seeds} seeds; {len(done)} runs took {seconds / 3600:.2f} hours of processor time; version "
        f"{', '.join(versions)}, commit {', '.join(commits)}."
    )
