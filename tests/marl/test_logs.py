"""Logs: what is in them after a run, after a break, and when records change their columns."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from marl.errors import MissingExtraError
from marl.logs import CsvLog, OperationLog, TensorBoardLog, open_logs, progress_bar, read_csv, table_of
from marl.records import Record
from marl.run import Progress, Run, make_run
from marl.training import train
from neuronsurgery import surgery
from tests.marl.runs import KNIFE, Recorder, rounds, small

FIRST: Record = {"steps": 10, "task": "007", "test/return": 0.1 + 0.2}
SECOND: Record = {"steps": 20, "task": "a,b", "test/return": float("-inf"), "surgery/units": 3}


class Report:
    """What a report can do for a log."""

    def __init__(self, number: int) -> None:
        self._number = number

    def to_json(self) -> str:
        return json.dumps({"operation": self._number})


@pytest.fixture
def run() -> Run:
    return make_run(small())


def at(run: Run, *, task: int = 0, num_steps: int) -> Run:
    run.progress = Progress(task=task, num_steps=num_steps)
    return run


def test_records_with_other_columns_keep_their_values_to_the_last_bit(run: Run, tmp_path: Path) -> None:
    log = CsvLog(tmp_path / "log.csv")
    for record in (FIRST, SECOND, {**FIRST, "steps": 30}):
        log.on_record(run, record)
    text = (tmp_path / "log.csv").read_text(encoding="utf-8")
    assert text.splitlines()[0] == "steps,task,test/return,surgery/units"
    assert text.splitlines()[1].endswith(",0.30000000000000004,")
    assert read_csv(tmp_path / "log.csv") == [FIRST, SECOND, {**FIRST, "steps": 30}]


def test_the_file_is_complete_after_every_record(run: Run, tmp_path: Path) -> None:
    log = CsvLog(tmp_path / "log.csv")
    log.on_record(run, FIRST)
    assert read_csv(tmp_path / "log.csv") == [FIRST]
    log.on_record(run, SECOND)
    assert read_csv(tmp_path / "log.csv") == [FIRST, SECOND]


def test_rows_after_the_checkpoint_are_dropped(run: Run, tmp_path: Path) -> None:
    log = CsvLog(tmp_path / "log.csv")
    for steps in (10, 20, 30):
        log.on_record(run, {"steps": steps})
    assert CsvLog.resumed(tmp_path / "log.csv", at(run, num_steps=20)).records == [{"steps": 10}, {"steps": 20}]
    assert CsvLog.resumed(tmp_path / "log.csv", at(run, num_steps=0)).records == []


def test_operations_after_the_checkpoint_are_dropped(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "operations.jsonl"
    log = OperationLog(path)
    # The last one is at the change to a task whose first steps were not yet taken.
    for number, (task, steps) in enumerate([(0, 10), (0, 20), (1, 20)]):
        log.on_operation(at(run, task=task, num_steps=steps), Report(number))
    with path.open("a", encoding="utf-8") as file:
        file.write('{"steps": 30, "task": 1, "rep')  # killed while writing
    OperationLog.resumed(path, at(run, task=1, num_steps=30))
    assert numbers_in(path) == [0, 1, 2]
    OperationLog.resumed(path, at(run, task=0, num_steps=20))
    assert numbers_in(path) == [0, 1]
    OperationLog.resumed(path, at(run, task=0, num_steps=10)).on_operation(run, Report(7))
    assert numbers_in(path) == [0, 7]


def numbers_in(path: Path) -> list[int]:
    return [json.loads(line)["report"]["operation"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_operation_of_a_run_is_written_down_and_can_be_read_again(tmp_path: Path) -> None:
    settings = small(KNIFE, {"tasks": "matrix_game", "surgery": {"every": 12, "parts": ["agent"]}})
    run, recorder = make_run(settings), Recorder()
    logs = open_logs(tmp_path, run)
    train(run, logs.csv, *logs.others, recorder)
    lines = [json.loads(line) for line in (tmp_path / "operations.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["updates"] for line in lines] == [12, 24, 36]
    assert [line["steps"] for line in lines] == [16, 24, 40]
    reports = [surgery.Report.from_json(json.dumps(line["report"])) for line in lines]
    assert [report.operation for report in reports] == [1, 2, 3]
    assert all(set(report.operated) == {"agent.encoder.0"} for report in reports)
    assert read_csv(tmp_path / "log.csv") == recorder.records == logs.csv.records
    assert (tmp_path / "settings.yaml").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of tensorboard's own imports
def test_numbers_can_be_read_by_tensorboard_and_later_ones_are_hidden(run: Run, tmp_path: Path) -> None:
    log = TensorBoardLog(tmp_path)
    for steps in (10, 20, 30):
        log.on_record(run, {"steps": steps, "task": "a", "test/return": steps / 4})
    TensorBoardLog(tmp_path, num_steps=20).on_record(run, {"steps": 25, "test/return": 1.0})
    assert scalars(tmp_path, "test/return") == [(10, 2.5), (20, 5.0), (25, 1.0)]


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events: Any = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_without_tensorboard_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match="tensorboard is not installed; install"):
        TensorBoardLog(tmp_path)


def test_where_there_is_no_terminal_the_bar_says_nothing(run: Run) -> None:
    text = io.StringIO()
    with progress_bar(Console(file=text), run) as bar:
        train(run, bar, is_stopped=rounds(2))
    assert text.getvalue().strip() == ""


def test_the_bar_counts_all_tasks_and_tells_returns(run: Run) -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=120)
    with progress_bar(console, run) as bar:
        train(run, bar)
        (task,) = bar._progress.tasks
        assert (task.completed, task.total) == (80, 80)
        assert "return" in task.description and "updates/s" in task.description
    assert "80/80 steps" in text.getvalue()


def test_the_bar_of_a_resumed_run_begins_where_the_run_does(run: Run) -> None:
    console = Console(file=io.StringIO(), force_terminal=True)
    run.progress = Progress(task=1, num_steps=48, num_task_steps=8)
    with progress_bar(console, run) as bar:
        (task,) = bar._progress.tasks
        assert task.completed == 48


def rows_of(records: list[Record]) -> Iterator[str]:
    text = io.StringIO()
    Console(file=text, width=120).print(table_of(records, num_last=2))
    return iter(text.getvalue().splitlines())


def test_the_table_shows_the_last_records_and_only_columns_that_they_have() -> None:
    shown = "\n".join(rows_of([{"steps": 5, "epsilon": 1.0}, FIRST, SECOND]))
    assert "last 2 of 3 records" in shown
    assert "epsilon" not in shown
    assert "a,b" in shown and "0.3" in shown and "0.30" not in shown
