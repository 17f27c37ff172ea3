"""Evaluation on all tasks of a sequence: when, of what, and that nothing else notices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from marl.all_tasks import TaskReturn
from marl.cli import app
from marl.configuring import Layer, to_yaml
from marl.run import Run, make_run
from marl.tasks_log import NAME, TasksLog, read_returns
from marl.training import Silent, train
from tests.marl.runs import differences, rounds, small


class Returns(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.found: list[TaskReturn] = []

    def on_returns(self, run: Run, returns: Sequence[TaskReturn]) -> None:
        self.found += returns


def returns_of(*layers: Layer) -> tuple[Run, list[TaskReturn]]:
    run, notes = make_run(small(*layers)), Returns()
    train(run, notes)
    return run, notes.found


def test_all_tasks_are_evaluated_before_the_first_and_after_each() -> None:
    _, found = returns_of()
    expected = [(0, 0), (40, 1), (80, 2)]
    assert [(each.steps, each.num_finished, each.task) for each in found] == [
        (*when, task) for when in expected for task in ("knife", "qtran")
    ]


def test_more_often_and_only_what_was_played_where_that_is_asked_for() -> None:
    _, found = returns_of({"all_tasks": {"every": 16, "unseen": False}})
    first = [(each.steps, each.task) for each in found if each.num_finished == 0]
    assert first == [(0, "knife"), (16, "knife"), (32, "knife")]
    assert {each.task for each in found if each.num_finished == 2} == {"knife", "qtran"}


@pytest.mark.parametrize("layer", [{"all_tasks": {"num_episodes": 0}}, {"tasks": "matrix_game:knife,knife"}])
def test_nothing_is_evaluated_where_that_is_not_asked_for_or_there_is_one_game(layer: Layer) -> None:
    assert returns_of(layer)[1] == []


def test_it_changes_nothing_of_the_training() -> None:
    often, never = returns_of({"all_tasks": {"every": 8}})[0], returns_of({"all_tasks": {"num_episodes": 0}})[0]
    assert differences(often.learner.state_dict(), never.learner.state_dict()) == []
    assert differences(often.replay.state_dict(), never.replay.state_dict()) == []


def test_the_same_games_are_played_every_time() -> None:
    _, found = returns_of({"all_tasks": {"every": 8}, "training": {"num_steps": 40}})
    fresh, _ = make_run(small()), None
    again = Returns()
    train(fresh, again, is_stopped=rounds(1))
    assert [each.mean_return for each in again.found[:2]] == [each.mean_return for each in found[:2]]


def test_a_log_that_goes_on_drops_later_rows_and_writes_none_twice(tmp_path: Path) -> None:
    run, rows = returns_of()
    log = TasksLog(tmp_path / NAME)
    log.on_returns(run, rows)
    log.on_returns(run, rows[:2])
    assert len(read_returns(tmp_path / NAME)) == 6
    half = make_run(small())
    train(half, is_stopped=rounds(5))
    kept = TasksLog.resumed(tmp_path / NAME, half).returns
    assert [each.steps for each in kept] == [0, 0, 40, 40]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sequence")
    (folder / "asked.yaml").write_text(to_yaml(small()), encoding="utf-8")
    command = ["train", "--settings", str(folder / "asked.yaml"), "--output", str(folder / "run")]
    assert CliRunner().invoke(app, command).exit_code == 0
    return folder / "run"


def test_the_command_line_shows_and_draws_what_was_learned_kept_and_transferred(folder: Path) -> None:
    result = CliRunner().invoke(app, ["evaluate", str(folder), "--all-tasks", "--reference", str(folder)])
    assert result.exit_code == 0, result.output
    for shown in ("mean return on each game", "the start", "1. knife", "2. qtran", "backward transfer", "over fresh"):
        assert shown in result.stdout
    assert (folder / "tasks.png").stat().st_size > 1000


def test_a_run_without_such_evaluations_says_what_to_set(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text((folder / "settings.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    result = CliRunner().invoke(app, ["evaluate", str(tmp_path), "--all-tasks"])
    assert result.exit_code == 2 and "set all_tasks.num_episodes before training" in result.stderr


def test_a_sequence_by_name_and_an_environment_are_not_both_asked_for() -> None:
    command = ["train", "--algorithm", "vdn", "--tasks", "matrix_five", "--environment", "matrix_game"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2 and "give one of them" in result.stderr
