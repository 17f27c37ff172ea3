"""The file in which a run writes how well it plays all of its tasks: a row for each task and time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from marl.all_tasks import TaskReturn
from marl.csv_files import read_rows, write_rows
from marl.run import Run
from marl.training import Silent

__all__ = ["NAME", "TasksLog", "read_returns"]

NAME = "tasks.csv"


class TasksLog(Silent):
    """Returns on all tasks as the rows of a CSV file, one for each task and time, and in `returns`."""

    def __init__(self, path: Path, returns: Sequence[TaskReturn] = ()) -> None:
        self.returns = list(returns)
        self._path = path

    @classmethod
    def resumed(cls, path: Path, run: Run) -> TasksLog:
        """With the rows of a file up to where the run is."""
        here = (run.progress.num_steps, run.progress.task + run.is_task_over)
        return cls(path, [each for each in read_returns(path) if (each.steps, each.num_finished) <= here])

    def on_returns(self, run: Run, returns: Sequence[TaskReturn]) -> None:
        again = {(each.steps, each.num_finished, each.task) for each in returns}
        kept = [each for each in self.returns if (each.steps, each.num_finished, each.task) not in again]
        self.returns = sorted([*kept, *returns], key=lambda each: (each.steps, each.num_finished))
        write_rows(self._path, list(_rows(self.returns)))


def read_returns(path: Path) -> list[TaskReturn]:
    """What a file holds; nothing if there is none."""
    return [
        TaskReturn(
            int(row["steps"]),
            int(row["finished"]),
            row["task"],
            float(row["return"]),
            float(row["standard_error"]),
            float(row["win_rate"]) if row["win_rate"] else None,
        )
        for row in read_rows(path)
    ]


def _rows(returns: Sequence[TaskReturn]) -> Iterator[dict[str, object]]:
    for each in returns:
        yield {
            "steps": each.steps,
            "finished": each.num_finished,
            "task": each.task,
            "return": each.mean_return,
            "standard_error": each.standard_error,
            "win_rate": "" if each.win_rate is None else each.win_rate,
        }
