"""`python -m marl reproduce`: a figure from its name, with progress on the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from marl.reproduce import sweep
from marl.reproduce.engines import Ended, make_engine
from marl.reproduce.figures.figure import Asked
from marl.reproduce.figures.registry import figures_of
from marl.reproduce.publishing import publish
from marl.reproduce.reproducing import RUNS, OnProgress, Reproducing, reproduce, tune
from marl.reproduce.results import Results

__all__ = ["run_command", "show_command"]

TUNING = "tuning"


def run_command(name: str, *, scale: str, num_seeds: int | None, engine: tuple[str, int], folder: Path) -> bool:
    """Reproduce a figure, all of them, or do the tuning; returns whether no run failed.

    Raises:
        SettingsError: an unknown figure, scale or engine.
        MissingExtraError: the engine or the picture needs a package that is not installed.
    """
    asked, console = Asked.of(scale, num_seeds), Console(soft_wrap=True)
    figures = [] if name == TUNING else figures_of(name)
    with _bar(console) as show:
        how = Reproducing(folder, make_engine(*engine), show)
        failed = list(tune(asked, how)) if name == TUNING else []
        for figure in figures:
            done = reproduce(figure, asked, how)
            failed += done.failed
            console.print(f"{figure.name}: {done.page} and {done.picture}", markup=False, highlight=False)
    _report(console, failed)
    return not failed


def show_command(*, scale: str, num_seeds: int | None, folder: Path, page: Path) -> None:
    """Write into a page what came out of the runs that are there; none is run.

    Raises:
        SettingsError: an unknown scale, or no such page.
        MissingExtraError: matplotlib is not installed.
    """
    parts = publish(figures_of("all"), Asked.of(scale, num_seeds), Results(folder / RUNS), page)
    Console(soft_wrap=True).print(f"{page}: {', '.join(parts)}", markup=False, highlight=False)


@contextmanager
def _bar(console: Console) -> Iterator[OnProgress]:
    """A line for the whole sweep; where there is no terminal, nothing until it is over."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("runs"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("reproducing")

        def show(progress: sweep.Progress) -> None:
            failures = f", {progress.num_failed} failed" if progress.num_failed else ""
            latest = f": {progress.latest.job.label}" if progress.latest else ""
            bar.update(
                task,
                total=progress.num_runs,
                completed=progress.num_done,
                description=f"reproducing{failures}{latest}",
            )

        yield show


def _report(console: Console, failed: Sequence[Ended]) -> None:
    for each in failed:
        console.print(f"failed: {each.job.label}: {each.error}", markup=False, highlight=False)
    if failed:
        console.print("The same command tries again what failed.", markup=False, highlight=False)
