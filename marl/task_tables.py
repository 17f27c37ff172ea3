"""How a run plays all of its tasks, for people: tables, and a figure of the returns over time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table

from marl.all_tasks import TaskReturn
from marl.errors import MarlError, MissingExtraError
from marl.logs import read_csv
from marl.run_settings import RunSettings
from marl.tasks_log import NAME, read_returns
from marl.transfer import Transfer, area, gains, matrix_of, transfer_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from marl.transfer import Matrix

__all__ = ["returns_in", "save_figure", "tables_of"]

Measure = Literal["mean_return", "win_rate"]

COLUMNS: Mapping[Measure, str] = {"mean_return": "test/return", "win_rate": "test/win_rate"}
TITLES: Mapping[Measure, str] = {"mean_return": "mean return", "win_rate": "share of episodes won"}


def returns_in(folder: Path, settings: RunSettings) -> list[TaskReturn]:
    """What a run has written of all its tasks.

    Raises:
        MarlError: it has written nothing.
    """
    returns = read_returns(folder / NAME)
    if not returns:
        found = "has one game only" if len(settings.tasks.games) < 2 else "was not evaluated on all of its tasks"
        raise MarlError(
            f"there is no {NAME} in {folder}, whose run {found}: set all_tasks.num_episodes before training"
        )
    return returns


def tables_of(
    folder: Path, settings: RunSettings, returns: Sequence[TaskReturn], references: Sequence[Path] = ()
) -> Iterator[Table]:
    """The matrix of returns, and of wins where there are some, each with what it says about every task.

    `references` are folders of runs of one task each, by fresh networks: what tasks gain over them is one more column.
    """
    tasks = [task.name for task in settings.tasks.tasks]
    for measure in _measures(returns):
        matrix = matrix_of(returns, tasks, of=measure)
        column = COLUMNS[measure]
        transfer = transfer_of(matrix, read_csv(folder / "log.csv"), column=column)
        yield _matrix_table(matrix, TITLES[measure])
        fresh = {name: each for path in references for name, each in _areas(path, column).items()}
        yield _stays_table(transfer, gains(transfer, fresh, best=1.0 if measure == "win_rate" else None))


def save_figure(path: Path, settings: RunSettings, returns: Sequence[TaskReturn]) -> None:
    """Draw the returns on each game over time, with the time in which it was learned in its color.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError.of("matplotlib") from error
    measures = _measures(returns)
    figure: Any = Figure(figsize=(7, 3 * len(measures)), layout="constrained")
    for axes, measure in zip(figure.subplots(len(measures), squeeze=False)[:, 0], measures, strict=True):
        _draw(axes, settings, returns, measure)
    figure.savefig(path)


def _draw(axes: Axes, settings: RunSettings, returns: Sequence[TaskReturn], measure: Measure) -> None:
    games = list(settings.tasks.games)
    for number, game in enumerate(games):
        points = [(each.steps, getattr(each, measure)) for each in returns if each.task == game]
        axes.plot(*zip(*points, strict=True), color=f"C{number}", marker=".", label=game)
    ends = list({each.num_finished: each.steps for each in reversed(returns)}.values())[::-1]
    for task, span in zip(settings.tasks.tasks, pairwise(ends), strict=False):  # a run may not be at its end
        axes.axvspan(*span, color=f"C{games.index(task.name)}", alpha=0.1, linewidth=0)
    axes.set(xlabel="steps of the environment", ylabel=TITLES[measure])
    axes.legend(fontsize="small")


def _measures(returns: Sequence[TaskReturn]) -> list[Measure]:
    return ["mean_return", *(["win_rate"] if any(each.win_rate is not None for each in returns) else [])]  # type: ignore[list-item]


def _areas(folder: Path, column: str) -> dict[str, float]:
    """The area under the curve of a run's tasks, by their names."""
    points: dict[str, list[tuple[float, float]]] = {}
    for record in read_csv(folder / "log.csv"):
        if column in record:
            points.setdefault(str(record["task"]), []).append((float(record["steps"]), float(record[column])))
    if not points:
        raise MarlError(f"there is nothing of {column} in {folder}/log.csv: give the folder of a run of one task")
    return {name: area(each) for name, each in points.items()}


def _matrix_table(matrix: Matrix, title: str) -> Table:
    table = Table(title=f"{title} on each game", title_justify="left")
    table.add_column("after")
    for game in matrix.games:
        table.add_column(game, justify="right")
    for number, row in enumerate(matrix.values):
        after = f"{number}. {matrix.tasks[number - 1]}" if number else "the start"
        table.add_row(after, *map(_number, row))
    return table


def _stays_table(transfer: Transfer, gained: Mapping[int, float]) -> Table:
    over = f"average {_number(transfer.average)}, backward transfer {_number(transfer.backward)}"
    names = ["task", "before", "end", "area", "forward", "forgotten", *["over fresh"] * bool(gained)]
    table = Table(title="each task", title_justify="left", caption=over, caption_justify="left")
    for name in names:
        table.add_column(name, justify="left" if name == "task" else "right")
    for stay in transfer.stays:
        values = [stay.before, stay.end, stay.area, stay.forward, stay.forgotten]
        cells = [*map(_number, values), _number(gained.get(stay.place, float("nan")))]
        table.add_row(f"{stay.place + 1}. {stay.task}", *cells[: len(names) - 1])
    means = [float("nan")] * 3 + [transfer.forward, transfer.forgetting]
    table.add_section()
    table.add_row("mean", *map(_number, means))
    return table


def _number(value: float) -> str:
    return "" if value != value else f"{value:.2f}"
