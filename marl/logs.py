"""What a run leaves behind while it trains, each by a listener of `marl.training`.

- `log.csv`: a row for each record. Records may have different columns: the header has all that were seen so far, cells
  of those that a row lacks are empty, and the file is replaced as a whole, so that it is complete at any time.
- `tasks.csv`: how well all tasks of a sequence are played, by `marl.all_tasks`.
- `operations.jsonl`: a line for each operation, with the report of what was operated on.
- `tensorboard/`: the numbers of each record, if asked for.
- a progress bar, where there is a terminal, and a table of the last records.

A run that goes on from a checkpoint drops what was logged after it, since it will happen again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from marl.all_tasks import is_evaluated
from marl.checkpoints import replacing
from marl.configuring import to_yaml
from marl.csv_files import read_rows, write_rows
from marl.errors import MissingExtraError
from marl.records import Record
from marl.run import Run
from marl.run_settings import RunSettings
from marl.tasks_log import NAME as TASKS_NAME
from marl.tasks_log import TasksLog
from marl.training import Listener, Silent

__all__ = ["CsvLog", "Logs", "OperationLog", "TensorBoardLog", "open_logs", "progress_bar", "table_of"]


def open_logs(folder: Path, run: Run, *, tensorboard: bool = False) -> Logs:
    """The logs in a run's folder, and its settings; what is there of later steps than the run has taken is dropped.

    Raises:
        MissingExtraError: TensorBoard is asked for and not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "settings.yaml") as path:
        path.write_text(to_yaml(run.settings), encoding="utf-8")
    others: list[Listener] = [OperationLog.resumed(folder / "operations.jsonl", run)]
    if is_evaluated(run):
        others.append(TasksLog.resumed(folder / TASKS_NAME, run))
    if tensorboard:
        others.append(TensorBoardLog(folder / "tensorboard", num_steps=run.progress.num_steps))
    return Logs(CsvLog.resumed(folder / "log.csv", run), tuple(others))


@dataclass(frozen=True)
class Logs:
    """Listeners that write."""

    csv: CsvLog
    """The one that knows all records."""
    others: tuple[Listener, ...]
    """Those for operations, for all tasks, and for TensorBoard."""


class CsvLog(Silent):
    """Records as the rows of a CSV file, and in `records`."""

    def __init__(self, path: Path, records: Sequence[Record] = ()) -> None:
        self.records = list(records)
        self._path = path

    @classmethod
    def resumed(cls, path: Path, run: Run) -> CsvLog:
        """With the rows of a file up to where the run is."""
        return cls(path, [record for record in read_csv(path) if cast(int, record["steps"]) <= run.progress.num_steps])

    def on_record(self, run: Run, record: Record) -> None:
        self.records.append(record)
        write_rows(self._path, self.records)


def read_csv(path: Path) -> list[Record]:
    """The records of a log, with numbers as they were; none if there is no file."""
    return [{name: _value(name, text) for name, text in row.items() if text != ""} for row in read_rows(path)]


class OperationLog(Silent):
    """Operations as lines of JSON: when, and the report."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @classmethod
    def resumed(cls, path: Path, run: Run) -> OperationLog:
        """With the lines of a file up to where the run is; one that was cut off counts as later."""
        log, here = cls(path), (run.progress.task, run.progress.num_steps)
        if path.exists():
            # What is written down at a change of task has the steps of the task before, hence both numbers.
            kept = [line for line in _whole_lines(path) if _place(json.loads(line)) <= here]
            with replacing(path) as partial:
                partial.write_text("".join(kept), encoding="utf-8")
        return log

    def on_operation(self, run: Run, report: object) -> None:
        progress, values = run.progress, json.loads(cast(Reported, report).to_json())
        where = {"steps": progress.num_steps, "updates": progress.num_updates, "task": progress.task}
        line = json.dumps({**where, "kind": type(report).__name__.lower(), "report": values})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")


class Reported(Protocol):
    """What the reports of `neuronsurgery` can do."""

    def to_json(self) -> str:
        """Everything as text."""


class TensorBoardLog(Silent):
    """The numbers of each record in the files that TensorBoard reads.

    Raises:
        MissingExtraError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, *, num_steps: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError.of("tensorboard") from error
        # Whatever an earlier run wrote at later steps is hidden.
        self._writer: Any = SummaryWriter(str(folder), purge_step=num_steps + 1)

    def on_record(self, run: Run, record: Record) -> None:
        for name, value in record.items():
            if not isinstance(value, str):
                self._writer.add_scalar(name, value, record["steps"])
        self._writer.flush()


@contextmanager
def progress_bar(console: Console, run: Run) -> Iterator[ProgressBar]:
    """A listener that shows how far a run is, while the context lasts; nothing where there is no terminal."""
    columns = (
        BarColumn(),
        TextColumn("{task.completed:,}/{task.total:,} steps"),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        total = steps_until(run.settings, len(run.settings.tasks.tasks))
        bar = progress.add_task("", total=total, completed=steps_done(run))
        yield ProgressBar(progress, bar, num_updates=run.progress.num_updates)


class ProgressBar(Silent):
    """Tells a bar of rich about steps, returns and the speed of learning."""

    def __init__(self, progress: Progress, bar: TaskID, *, num_updates: int) -> None:
        self._progress, self._bar = progress, bar
        self._began, self._num_updates = time.monotonic(), num_updates

    def on_round(self, run: Run) -> None:
        seconds = time.monotonic() - self._began
        rate = (run.progress.num_updates - self._num_updates) / max(seconds, 1e-9)
        total, weight = run.averages.sums["train/return"]
        text = f"return {total / weight:.2f}, {rate:.1f} updates/s"
        self._progress.update(self._bar, completed=steps_done(run), description=text)


def steps_done(run: Run) -> int:
    """Steps of those that the run is to take; what a task took beyond its own are not counted."""
    progress, settings = run.progress, run.settings
    return steps_until(settings, progress.task) + min(progress.num_task_steps, settings.num_steps_of(progress.task))


def steps_until(settings: RunSettings, place: int) -> int:
    """Steps of the tasks before a place of the sequence."""
    return sum(map(settings.num_steps_of, range(place)))


SHOWN = (
    *("steps", "task", "epsilon", "train/return", "test/return", "test/win_rate", "learner/loss"),
    *("agent/stagnant", "mixer/stagnant", "surgery/units"),
)
"""Columns of the table; the log has more."""


def table_of(records: Sequence[Record], *, num_last: int = 10) -> Table:
    """The last records, for people."""
    last = records[-num_last:]
    table = Table(
        title=f"last {len(last)} of {len(records)} records",
        box=SIMPLE,
        pad_edge=False,
        show_edge=False,
        collapse_padding=True,
    )
    columns = [name for name in SHOWN if any(name in record for record in last)]
    if len({record.get("task") for record in last}) < 2:
        columns = [name for name in columns if name != "task"]
    for name in columns:
        table.add_column(name.replace("/", "/\n"), justify="left" if name == "task" else "right")
    for record in last:
        table.add_row(*(_cell(record.get(name, "")) for name in columns))
    return table


def _cell(value: float | int | str) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _value(name: str, text: str) -> float | int | str:
    if name == "task":  # a name, which may look like a number
        return text
    try:
        return int(text)
    except ValueError:
        return float(text)


def _whole_lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


def _place(line: dict[str, int]) -> tuple[int, int]:
    return line["task"], line["steps"]
